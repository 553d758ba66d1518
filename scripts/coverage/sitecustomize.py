"""Count a notebook's exported cells as lines of the module that is made from them.

With this folder on PYTHONPATH and COVERAGE_PROCESS_START set, `nbdev_test` compiles each
exported cell under the name and line numbers of its module, so that coverage adds what
the notebooks run to what the tests run.
"""

import ast
import json
import os
import re
import sys
from pathlib import Path

LIB = Path(__file__).resolve().parents[2] / 'complement_objectives'


def code_lines(source):
    "A cell's lines without directives, from the first that is not blank."
    lines = [line for line in source.splitlines() if not line.startswith('#|')]
    while lines and not lines[0].strip():
        lines.pop(0)
    return '\n'.join(lines).rstrip()


def cells(notebook):
    "Id → code of a notebook's cells."
    return {
        cell['id']: code_lines(''.join(cell['source']))
        for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']
        if cell['cell_type'] == 'code'
    }


def places():
    "Code of each exported cell → its module, and the line it begins on."
    found, notebooks = {}, {}
    for module in LIB.rglob('*.py'):
        lines = module.read_text(encoding='utf-8').splitlines()
        for i, line in enumerate(lines):
            if marker := re.match(r'# %% (\S+\.ipynb) #(\w+)', line):
                notebook = (module.parent / marker[1]).resolve()
                if notebook not in notebooks:
                    notebooks[notebook] = cells(notebook)
                start = next(k for k in range(i + 1, len(lines)) if lines[k].strip())
                found[notebooks[notebook].get(marker[2])] = str(module), start + 1
    return found


def patch():
    "Let IPython's compiler name exported cells after their module."
    from IPython.core.compilerop import CachingCompiler

    found = places()
    plain_name, plain_parse = CachingCompiler.get_code_name, CachingCompiler.ast_parse
    offsets = {}

    def get_code_name(self, raw_code, transformed_code, number):
        place = found.get(code_lines(transformed_code))
        name = plain_name(self, raw_code, transformed_code, number)
        if place is None:
            return name
        blank = len(transformed_code) - len(transformed_code.lstrip('\n'))
        offsets[name] = place[0], place[1] - 1 - blank
        return name

    def ast_parse(self, source, filename='<unknown>', symbol='exec'):
        tree = plain_parse(self, source, filename, symbol)
        if filename in offsets:
            ast.increment_lineno(tree, offsets[filename][1])
        return tree

    def call(self, codeob, filename, symbol, **kwargs):
        filename = offsets.get(filename, (filename,))[0]
        return plain_call(self, codeob, filename, symbol, **kwargs)

    plain_call = CachingCompiler.__call__
    CachingCompiler.get_code_name = get_code_name
    CachingCompiler.ast_parse = ast_parse
    CachingCompiler.__call__ = call


if 'COVERAGE_PROCESS_START' in os.environ and any(
    Path(word).name == 'nbdev_test' for word in sys.orig_argv
):
    patch()
