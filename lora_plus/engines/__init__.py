"""One optional framework a file; the library itself imports none of them."""

from . import ranks as ranks
