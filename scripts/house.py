"Check what a reader relies on: line width, page length, order of the sidebar, one meaning a name, every public name at work."

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

WIDTH, CELLS, WORDS = 88, 80, 3000
LIB = 'complement_objectives'
ROOT = Path(__file__).resolve().parents[1]


def pages():
    "Every notebook's path and cells."
    for path in sorted((ROOT / 'nbs').glob('*.ipynb')):
        yield path, json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    "Words of the lines that begin with #|."
    lines = [line[2:] for line in source(cell).splitlines() if line.startswith('#|')]
    return {word for line in lines for word in line.replace(':', ' ').split()}


def hidden(cell):
    return 'hide' in directives(cell) or 'include' in directives(cell)


def exported(cell):
    return bool(directives(cell) & {'export', 'exports', 'exporti'})


def code(cells):
    return [cell for cell in cells if cell['cell_type'] == 'code']


def wide_lines():
    "Lines of visible cells that are wider than the column."
    for path, cells in pages():
        for i, cell in enumerate(cells):
            if cell['cell_type'] != 'code' or hidden(cell):
                continue
            for line in source(cell).splitlines():
                if len(line) > WIDTH:
                    yield f'{path.name} cell {i}: {len(line)} characters: {line.strip()[:60]}…'


def long_pages():
    "Pages with too many cells or words."
    for path, cells in pages():
        words = sum(
            len(source(c).split()) for c in cells if c['cell_type'] == 'markdown'
        )
        if len(cells) > CELLS:
            yield f'{path.name}: {len(cells)} cells (at most {CELLS})'
        if words > WORDS:
            yield f'{path.name}: {words} words (at most {WORDS})'


def sidebar():
    "Pages that the sidebar misses or that stand out of the order of their numbers; numbers given twice."
    listed = re.findall(
        r'- (\w+\.ipynb)', (ROOT / '_quarto.yml').read_text(encoding='utf-8')
    )
    listed = [name for name in listed if name != 'index.ipynb']
    there = {path.name for path, _ in pages()} - {'index.ipynb'}
    yield from (f'{name} is not in the sidebar' for name in sorted(there - set(listed)))
    yield from (
        f'{name} is in the sidebar and nowhere else'
        for name in sorted(set(listed) - there)
    )
    yield from (
        f'{b} comes after {a} in the sidebar'
        for a, b in zip(listed, listed[1:])
        if b < a
    )
    numbers = defaultdict(list)
    for name in sorted(there):
        numbers[name.split('_')[0]].append(name)
    yield from (
        f'one number: {", ".join(names)}'
        for names in numbers.values()
        if len(names) > 1
    )


def module_of(cells):
    "The module that a notebook exports to, or None."
    found = [
        m[1]
        for c in code(cells)
        if (m := re.search(r'#\| *default_exp ([\w.]+)', source(c)))
    ]
    return found[0] if found else None


def own_names(cells):
    "Public names that the exported cells define."
    for cell in code(cells):
        if not exported(cell):
            continue
        for node in ast.parse(source(cell)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                if any('patch' in ast.unparse(d) for d in node.decorator_list):
                    continue
                yield node.name
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        yield target.id


def public(cells):
    return sorted({name for name in own_names(cells) if not name.startswith('_')})


def meanings():
    "Names that two modules define differently."
    where = defaultdict(dict)
    for path, cells in pages():
        if (module := module_of(cells)) is None:
            continue
        loaded = importlib.import_module(f'{LIB}.{module}'.removesuffix('.__init__'))
        for name in public(cells):
            where[name][module] = getattr(loaded, name, None)
    for name, objects in sorted(where.items()):
        if len({id(o) for o in objects.values()}) > 1:
            yield f'{name}: {", ".join(objects)}'


def mentions(text, name):
    return re.search(rf'\b{re.escape(name)}\b', text) is not None


def asserts(text):
    return (
        re.search(r'^\s*assert |\btest_\w+\(|\bexpect_fail|\braises\(', text, re.M)
        is not None
    )


def at_work():
    "Public names that their page does not show at work, or about which it asserts nothing."
    for path, cells in pages():
        lessons = [source(c) for c in code(cells) if not exported(c)]
        checked = [text for text in lessons if asserts(text)]
        for name in public(cells):
            if not any(mentions(text, name) for text in lessons):
                yield f'{path.name}: {name} is not shown'
            elif not any(mentions(text, name) for text in checked):
                yield f'{path.name}: nothing is asserted of {name}'


def undocumented():
    "Public names without a docstring."
    for path, cells in pages():
        if (module := module_of(cells)) is None:
            continue
        loaded = importlib.import_module(f'{LIB}.{module}'.removesuffix('.__init__'))
        for name in public(cells):
            it = getattr(loaded, name, None)
            if (inspect.isclass(it) or inspect.isfunction(it)) and not it.__doc__:
                yield f'{path.name}: {name} has no docstring'


RULES = dict(
    width=wide_lines,
    length=long_pages,
    sidebar=sidebar,
    meanings=meanings,
    work=at_work,
    docs=undocumented,
)


def main():
    "Print what is off; exit status 1 if anything is."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'rules',
        nargs='*',
        help=f'which rules: {", ".join(RULES)}; all if none is named',
    )
    parser.add_argument('--most', type=int, default=20, help='lines a rule at the most')
    args = parser.parse_args()
    off = 0
    for name in args.rules or RULES:
        found = list(RULES[name]())
        off += len(found)
        print(f'{name}: {len(found)}')
        for line in found[: args.most]:
            print(f'  {line}')
        if len(found) > args.most:
            print(f'  … and {len(found) - args.most} more')
    sys.exit(bool(off))


if __name__ == '__main__':
    main()
