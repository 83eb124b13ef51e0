"""The command ``celery azureblockblob``.

Celery's command line imports this at every start, for whatever command: so it is a module of its own, and imports
neither the backend nor the Azure SDK.
"""
from __future__ import annotations

import re
from typing import Any

import click

from celery.exceptions import ImproperlyConfigured

#: What the letters behind a number stand for, in seconds.
UNITS = {'': 1, 's': 1, 'm': 60, 'h': 60 * 60, 'd': 24 * 60 * 60}


def read_age(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Return an age such as ``90``, ``15m``, ``12h`` or ``30d`` in seconds."""
    if value is None:
        return None
    match = re.fullmatch(r'(\d{1,9}(?:\.\d+)?)([smhd]?)', value.strip().lower())
    if not match or not float(match[1]):
        raise click.BadParameter('write a number above 0 and a unit: 90s, 15m, 12h or 30d.')
    return float(match[1]) * UNITS[match[2]]


@click.group()
def azureblockblob() -> None:
    """Look after the results in Azure Blob Storage."""


@azureblockblob.command()
@click.option('--older-than', callback=read_age, metavar='AGE',
              help='Delete what is older than this (90s, 15m, 12h, 30d). Default: the setting result_expires.')
@click.option('--dry-run', is_flag=True, help='Only count.')
@click.pass_context
def cleanup(ctx: click.Context, older_than: float | None, dry_run: bool) -> None:
    """Delete results and groups that have expired.

    The logs of chords are kept longer: for result_chord_expires seconds, 7 days by default.
    """
    try:
        _clean_up(ctx.obj.app.backend, older_than, dry_run)
    except ImproperlyConfigured as exc:
        raise click.ClickException(str(exc)) from exc


def _clean_up(backend: Any, older_than: float | None, dry_run: bool) -> None:
    if not hasattr(backend, 'delete_expired'):
        raise click.UsageError(f'The result backend of this app is {type(backend).__name__}, not azureblockblob.')
    from azure.core.exceptions import AzureError  # what there is of the SDK once there is a backend
    try:
        _delete_expired(backend, older_than, dry_run)
    except AzureError as exc:
        raise click.ClickException(str(exc)) from exc


def _delete_expired(backend: Any, older_than: float | None, dry_run: bool) -> None:
    totals = backend.delete_expired(older_than, dry_run=True)
    if totals is None:
        raise click.UsageError('Results of this app do not expire (result_expires): say --older-than.')
    click.echo(f'{backend.as_uri()}: {totals.found} blobs, {totals.expired} expired')
    if dry_run or not totals.expired:
        return
    with click.progressbar(length=totals.expired, label='Deleting') as bar:
        totals = backend.delete_expired(older_than, on_progress=lambda now: bar.update(now.expired - bar.pos))
    click.echo(f'{totals.deleted} deleted, {totals.expired - totals.deleted} kept: changed or gone meanwhile')
