"""Which notebook cells the tests skip, by the flag that skips them. Flags named as arguments count as run.

python scripts/skipped_cells.py [FLAG …]"""

import configparser
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def skipped(path: Path, flags: set[str]):
    "(flag, first line of code) of every code cell that is not run."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        directives = re.findall(r'^#\s*\|\s*(\w+)(?::\s*(\w+))?', source, re.M)
        why = [
            name
            for name, value in directives
            if name in flags or (name, value) == ('eval', 'false')
        ]
        if cell['cell_type'] == 'code' and why:
            yield (
                why[0],
                next(
                    (
                        line
                        for line in source.split('\n')
                        if line.strip() and not line.startswith('#')
                    ),
                    '',
                ),
            )


def main():
    config = configparser.ConfigParser()
    config.read(root / 'settings.ini', encoding='utf-8')
    flags = set(config['DEFAULT']['tst_flags'].split()) - set(sys.argv[1:])
    total = 0
    for path in sorted((root / 'nbs').glob('*.ipynb')):
        for flag, line in skipped(path, flags):
            print(f'{path.name:24} {flag:6} {line[:90]}')
            total += 1
    print(f'{total} cells skipped (flags: {", ".join(sorted(flags))})')


if __name__ == '__main__':
    main()
