"""Command line of the tools: ``python -m upstream patch|test|integration RELEASE``."""
from __future__ import annotations

import argparse
import subprocess
import sys

from upstream import diff, suite


def main() -> int:
    """Run one tool.

    Returns:
        The exit status: 0 if all is well.
    """
    parser = argparse.ArgumentParser(prog='upstream', description=__doc__)
    parser.add_argument('tool', choices=['patch', 'test', 'integration'])
    parser.add_argument('release', help='a release of Celery, for instance 5.7.0')
    arguments = parser.parse_args()
    try:
        return _run(arguments.tool, arguments.release)
    except (LookupError, subprocess.SubprocessError) as problem:
        print(f'upstream {arguments.tool}: {problem}', file=sys.stderr)
        return 1


def _run(tool: str, release: str) -> int:
    if tool == 'integration':
        from upstream import integration  # needs the services of the tests
        return integration.compare(release)
    return {'patch': diff.write, 'test': suite.compare}[tool](release)


if __name__ == '__main__':
    sys.exit(main())
