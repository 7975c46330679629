"""The checker of annotations under pytest: beartype, with an `int` good enough for a `float`."""

from beartype import BeartypeConf, beartype

# PEP 484 says so, type checkers and users take it so; beartype's default would refuse `fps=16`.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
