"""Command line of the tools: ``python -m upstream patch|test RELEASE``."""
from __future__ import annotations

import argparse
import subprocess
import sys

from upstream import diff, suite
from upstream.edits import PlaceNotFound


def main() -> int:
    """Run one tool.

    Returns:
        The exit status: 0 if all is well.
    """
    parser = argparse.ArgumentParser(prog='upstream', description=__doc__)
    parser.add_argument('tool', choices=['patch', 'test'])
    parser.add_argument('release', help='a release of Celery, for instance 5.7.0')
    arguments = parser.parse_args()
    tool = {'patch': diff.write, 'test': suite.compare}[arguments.tool]
    try:
        return tool(arguments.release)
    except (PlaceNotFound, LookupError, subprocess.SubprocessError) as problem:
        print(f'upstream {arguments.tool}: {problem}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
