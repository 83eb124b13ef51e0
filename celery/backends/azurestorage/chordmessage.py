"""What the messages of a chord say: which chord a part is counted in, and which tasks are its parts."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from celery import uuid
from celery.app.task import Context
from celery.utils.functional import maybe_list

__all__ = (
    'Mark', 'drop_errbacks', 'errbacks_of', 'last_step_of', 'mark_body', 'mark_of', 'parts_in_outer_chord',
    'parts_of', 'request_of', 'unmark_body')


class Mark(NamedTuple):
    """Tells whoever runs a part that it is counted in a log. It stands in the chord's body, in each part's message.

    Attributes:
        chord_size: Number of parts; None if the log says it later.
        chord_id: What the log is named after. The last step of a chain may come with another group's id.
        chord_run: Tells apart chords that are started one after the other with the same id.
    """

    chord_size: int | None
    chord_id: str
    chord_run: str


def mark_body(body: dict[str, Any], size: int | None, chord_id: str) -> None:
    """Mark the body of a chord that is counted in a log.

    The options have the mark too: where messages are pickled, they are all that is kept of a group, chain or chord.
    """
    mark = Mark(size, chord_id, uuid())._asdict()
    body.update(mark)
    body.setdefault('options', {}).update(mark)


def unmark_body(body: dict[str, Any]) -> None:
    """Take the mark from a body."""
    for place in (body, body.get('options', {})):
        for field in Mark._fields:
            place.pop(field, None)


def mark_of(request: Any) -> Mark | None:
    """Return the mark that the message of a task has, if it is part of a chord that is counted in a log."""
    body = request.chord
    if request.id and request.group and body:
        for place in (body, body.get('options', {})):
            if 'chord_size' in place:
                return Mark(*(place.get(field, request.group) for field in Mark._fields))
    return None


def ends_of(signature: Any) -> list[Any]:
    """Return the tasks at the end of a signature. Each of them counts in the header that the signature is in."""
    kind, kwargs = signature.get('subtask_type'), signature.get('kwargs')
    if kind == 'chord':
        return ends_of(kwargs['body'])
    if kind == 'group':
        return [end for task in kwargs['tasks'] for end in ends_of(task)]
    if kind == 'chain':
        return next((ends for task in reversed(kwargs['tasks']) if (ends := ends_of(task))), [])
    return [signature]


def last_step_of(signature: Any) -> Any:
    """Return the body of a chord, or the chord or group that a chain ends with; None for all else."""
    kind, kwargs = signature.get('subtask_type'), signature.get('kwargs')
    if kind == 'chord':
        return kwargs['body']
    if kind == 'chain':
        last = next((task for task in reversed(kwargs['tasks']) if ends_of(task)), None)
        return last if last and last.get('subtask_type') in ('chord', 'group') else None
    return None


def parts_in_outer_chord(body: Any) -> list[Any]:
    """Return the tasks at the end of a chord's body that are parts of another chord, which the body is in.

    Each is given that chord: Celery tells only the body of it if it is in a header that is a generator.
    """
    outer = {name: body['options'][name] for name in ('chord', 'group_id') if name in body['options']}
    ends = ends_of(body)
    for end in ends:
        end['options'] = {**outer, **end['options']}
    return [end for end in ends if mark_of(request_of(end))]


def errbacks_of(signature: Mapping[str, Any]) -> list[Any]:
    """Return what is to be called if a task fails."""
    return maybe_list(signature['options'].get('link_error')) or []


def drop_errbacks(signature: dict[str, Any], errbacks: Sequence[Any]) -> None:
    """Take errbacks from a signature, since they are called for another one."""
    left = [errback for errback in errbacks_of(signature) if errback not in errbacks]
    signature['options'] = {**signature['options'], 'link_error': left}


def parts_of(request: Any) -> Iterator[Any]:
    """Yield the requests of all parts that `request` stands for.

    When a chain fails, Celery reports its last step, in place of the parts which that step would have become.
    """
    for end in ends_of(request):
        yield request if end is request else request_of(end, group=request.group, chord=request.chord)


def request_of(signature: Mapping[str, Any], **known: Any) -> Any:
    """Return the request of a task that is not sent."""
    options = signature['options']
    return Context(options, **{'id': options.get('task_id'), 'group': options.get('group_id'), **known})
