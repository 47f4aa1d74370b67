"""Code lines of each file named: no blanks, comments or docstrings."""

import ast
import io
import sys
import tokenize
from pathlib import Path

LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
MARKS = (tokenize.ENCODING, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT + MARKS:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # a string that is a statement is a docstring
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


sizes = {name: code_lines(Path(name).read_text()) for name in sys.argv[1:]}
for name, size in sizes.items():
    print(f"{size:6d} {name}")
print(f"{sum(sizes.values()):6d} total")
