"""Configuration: strict sections, YAML/TOML files with line numbers, `key.sub=value` overrides, and pieces of an objective.

Precedence: defaults < files left to right (mappings are merged, everything else replaced) < overrides left to right (which replace).
"""

from tilt.config.files import Document, override, read_file, read_value
from tilt.config.names import hint, nearest
from tilt.config.pieces import build_piece
from tilt.config.schema import Section, dump, gather, load, parse, plain, recipe_name

__all__ = [
    "Document",
    "Section",
    "build_piece",
    "dump",
    "gather",
    "hint",
    "load",
    "nearest",
    "override",
    "parse",
    "plain",
    "read_file",
    "read_value",
    "recipe_name",
]
