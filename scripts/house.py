"""Check what a reader relies on, and draw the imports.

width     no line of a visible cell or of an exported module over 88 characters
length    no page over 85 visible cells or 3,000 words
sidebar   every page, in the order of the numbers, no number and no name twice
meanings  no two modules export different objects under one name
work      every exported public name is shown and asserted on its page
docs      every exported public function and class has a docstring
faces     a package offers what its modules export, and nothing else
private   no module imports another one's private names
floors    imports run downwards only, over at most seven floors
light     what must be importable without a heavy package is

python scripts/house.py [RULE …]        exit status 1 if anything is off
python scripts/house.py --draw          the floors, and what stands on each
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

WIDTH, CELLS, WORDS, FLOORS = 88, 85, 3000, 7
LIB = 'complement_objectives'
ROOT = Path(__file__).resolve().parents[1]
LIGHT = dict(
    losses=['fastai', 'matplotlib', 'pandas', 'foolbox'],
    training=['foolbox'],
    detection=['foolbox'],
)


# --- notebooks


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
    "Does nbdev list the names of this cell in `__all__`?"
    return bool(directives(cell) & {'export', 'exports'})


def code(cells):
    return [cell for cell in cells if cell['cell_type'] == 'code']


def module_of(cells):
    "The module that a notebook exports to, or None."
    for cell in code(cells):
        if found := re.search(r'#\| *default_exp ([\w.]+)', source(cell)):
            return found[1]
    return None


def own_names(cells):
    "Public names that the exported cells define."
    for cell in code(cells):
        if not exported(cell):
            continue
        for node in ast.parse(source(cell)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                if not any('patch' in ast.unparse(d) for d in node.decorator_list):
                    yield node.name
            elif isinstance(node, ast.Assign):
                targets = [t for t in node.targets if isinstance(t, ast.Name)]
                yield from (t.id for t in targets)


def public(cells):
    return sorted({name for name in own_names(cells) if not name.startswith('_')})


def load(module):
    return importlib.import_module(f'{LIB}.{module}'.removesuffix('.__init__'))


# --- what a reader sees


def exported_lines(path):
    "Lines of a module with their numbers, but for the `__all__` that nbdev wraps."
    inside = False
    for i, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        inside = inside or line.startswith('__all__ = [')
        if not inside:
            yield i, line
        inside = inside and ']' not in line


def width():
    for path, cells in pages():
        for i, cell in enumerate(cells):
            if cell['cell_type'] != 'code' or hidden(cell):
                continue
            for line in source(cell).splitlines():
                if len(line) > WIDTH:
                    yield f'{path.name} cell {i}: {len(line)}: {line.strip()[:60]}…'
    for path in sorted((ROOT / LIB).rglob('*.py')):
        if path.name == '_modidx.py':
            continue
        for i, line in exported_lines(path):
            if len(line) > WIDTH:
                name = path.relative_to(ROOT)
                yield f'{name}:{i}: {len(line)}: {line.strip()[:60]}…'


def length():
    for path, cells in pages():
        seen = [c for c in cells if not hidden(c)]
        texts = [source(c) for c in seen if c['cell_type'] == 'markdown']
        words = sum(len(text.split()) for text in texts)
        if len(seen) > CELLS:
            yield f'{path.name}: {len(seen)} cells (at most {CELLS})'
        if words > WORDS:
            yield f'{path.name}: {words} words (at most {WORDS})'


def sidebar():
    text = (ROOT / '_quarto.yml').read_text(encoding='utf-8')
    listed = [n for n in re.findall(r'- (\w+\.ipynb)', text) if n != 'index.ipynb']
    there = {path.name for path, _ in pages()} - {'index.ipynb'}
    for name in sorted(there - set(listed)):
        yield f'{name} is not in the sidebar'
    for name in sorted(set(listed) - there):
        yield f'{name} is in the sidebar and nowhere else'
    for a, b in zip(listed, listed[1:]):
        if b < a:
            yield f'{b} comes after {a} in the sidebar'
    for part, what in ((0, 'number'), (1, 'name')):
        groups = defaultdict(list)
        for name in sorted(there):
            groups[name.split('_', 1)[part]].append(name)
        for names in groups.values():
            if len(names) > 1:
                yield f'one {what}: {", ".join(names)}'


# --- names


def meanings():
    where = defaultdict(dict)
    for _, cells in pages():
        if (module := module_of(cells)) is not None:
            loaded = load(module)
            for name in public(cells):
                where[name][module] = getattr(loaded, name, None)
    for name, objects in sorted(where.items()):
        if len({id(o) for o in objects.values()}) > 1:
            yield f'{name}: {", ".join(objects)}'


def mentions(text, name):
    return re.search(rf'\b{re.escape(name)}\b', text) is not None


def asserts(text):
    found = re.search(r'^\s*assert |\btest_\w+\(|\bexpect_fail|\braises\(', text, re.M)
    return found is not None


def work():
    "Shown in a cell that is not exported; asserted there or in one of the next two."
    for path, cells in pages():
        lessons = [source(c) for c in code(cells) if not exported(c)]
        sure = [any(map(asserts, lessons[i : i + 3])) for i in range(len(lessons))]
        for name in public(cells):
            shown = [i for i, text in enumerate(lessons) if mentions(text, name)]
            if not shown:
                yield f'{path.name}: {name} is not shown'
            elif not any(sure[i] for i in shown):
                yield f'{path.name}: nothing is asserted of {name}'


def docs():
    for path, cells in pages():
        if (module := module_of(cells)) is None:
            continue
        loaded = load(module)
        for name in public(cells):
            it = getattr(loaded, name, None)
            if (inspect.isclass(it) or inspect.isfunction(it)) and not it.__doc__:
                yield f'{path.name}: {name} has no docstring'


# --- modules


def modules():
    "Every module's name below the library, and its path."
    for path in sorted((ROOT / LIB).rglob('*.py')):
        parts = path.relative_to(ROOT / LIB).with_suffix('').parts
        if parts not in (('__init__',), ('_modidx',)):
            yield '.'.join(parts), path


def target(node, module):
    "The module that a `from … import` reads, below the library, or None."
    if node.level == 0:
        name = node.module or ''
        return name.removeprefix(f'{LIB}.') if name.startswith(f'{LIB}.') else None
    package = module.split('.')[: -node.level]
    return '.'.join([*package, node.module or '']).strip('.')


def imports(module, path):
    "(module below the library, names) of every import in a module."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            if (found := target(node, module)) is not None:
                yield found, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f'{LIB}.'):
                    yield alias.name.removeprefix(f'{LIB}.'), []


def packages():
    return sorted({m.split('.')[0] for m, _ in modules() if m.endswith('.__init__')})


def rooms():
    "Each package or lone module → those it imports."
    below = defaultdict(set)
    for module, path in modules():
        room = module.split('.')[0]
        below[room] |= set()
        for found, names in imports(module, path):
            others = [found.split('.')[0]] if found else names
            below[room] |= {other for other in others if other and other != room}
    return dict(below)


def floors():
    "Each room's floor, the lowest that is above all it imports; None on a circle."
    below, floor = rooms(), {}
    while True:
        ready = [r for r in below if r not in floor and below[r] <= floor.keys()]
        if not ready:
            return {room: floor.get(room) for room in below}
        floor |= {r: 1 + max((floor[b] for b in below[r]), default=0) for r in ready}


def inner_circles(package):
    "Modules of a package that import each other, but for its face."
    names = {m: p for m, p in modules() if m.startswith(f'{package}.')}
    names.pop(f'{package}.__init__', None)
    below = {m: {f for f, _ in imports(m, p)} & names.keys() for m, p in names.items()}
    while ready := [m for m in below if not below[m]]:
        below = {m: b - set(ready) for m, b in below.items() if m not in ready}
    return sorted(below)


def floor_faults():
    found = floors()
    for room, floor in found.items():
        if floor is None:
            yield f'{room} imports what imports it'
        elif floor > FLOORS:
            yield f'{room} stands on floor {floor} (at most {FLOORS})'
    for package in packages():
        for module in inner_circles(package):
            yield f'{module} imports what imports it'
    for module, path in modules():
        room = module.split('.')[0]
        if f'{room}.__init__' != module:
            for other, _ in imports(module, path):
                if other == room and room in packages():
                    yield f'{module} imports the face of its own package'


def faces():
    for package in packages():
        face = load(package)
        inner = [m for m, _ in modules() if m.startswith(f'{package}.')]
        inner = [load(m) for m in inner if not m.endswith('.__init__')]
        offered = set(getattr(face, '__all__', []))
        made = set().union(*(set(m.__all__) for m in inner))
        extra = {n for n in vars(face) if n[0] != '_'} - offered
        extra -= {m.__name__.rsplit('.', 1)[1] for m in inner}
        for name in sorted(made - offered):
            yield f'{package} does not offer {name}'
        for name in sorted(extra):
            yield f'{package} holds {name}, which it does not offer'


def private():
    for module, path in modules():
        for found, names in imports(module, path):
            for name in names:
                if name.startswith('_') and not name.startswith('__'):
                    yield f'{module} imports {name} of {found}'


def light():
    for package, heavy in LIGHT.items():
        code = f'import sys, {LIB}.{package}; print(*set(sys.modules) & {set(heavy)})'
        run = [sys.executable, '-W', 'ignore', '-c', code]
        loaded = subprocess.run(run, capture_output=True, text=True, check=True)
        for name in loaded.stdout.split():
            yield f'{package} loads {name}'


def draw():
    "The floors from the top, and under each room what it imports."
    found, below = floors(), rooms()
    arrows = sum(len(b) for b in below.values())
    print(f'{len(found)} rooms, {arrows} arrows, {max(found.values())} floors')
    for floor in range(max(found.values()), 0, -1):
        for room in sorted(r for r, f in found.items() if f == floor):
            rest = ', '.join(sorted(below[room])) or 'nothing'
            print(f'  {floor}  {room:<14} → {rest}')


RULES = dict(
    width=width,
    length=length,
    sidebar=sidebar,
    meanings=meanings,
    work=work,
    docs=docs,
    faces=faces,
    private=private,
    floors=floor_faults,
    light=light,
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('rules', nargs='*', metavar='RULE', help='all if none is named')
    parser.add_argument('--most', type=int, default=20, help='lines a rule at the most')
    parser.add_argument('--draw', action='store_true', help='draw the imports')
    args = parser.parse_args()
    if unknown := set(args.rules) - RULES.keys():
        parser.error(f'no rule {", ".join(sorted(unknown))}: {", ".join(RULES)}')
    if args.draw:
        return draw()
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
