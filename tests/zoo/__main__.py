"""Builds one variant: python -m tests.zoo NAME DIR"""

import sys

from tests import zoo

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in zoo.NAMES:
        sys.exit(f"usage: python -m tests.zoo NAME DIR\nNAME is one of: {', '.join(zoo.NAMES)}")
    print(zoo.build(sys.argv[1], sys.argv[2]))
