"""tmp"""

from .driver import *
