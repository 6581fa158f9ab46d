"""RE2's syntax in terms of Python's ``re``: two languages that look the same and differ in detail.

Only whole matches are of interest here, so groups capture nothing and greediness does not count.
Source: https://github.com/google/re2/wiki/Syntax; what it leaves open follows RE2's parser.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

from qwrap.errors import UnsupportedOpError

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included

LARGEST_REPEAT = 1000
REPEAT = r"[*+?]|\{\d+(,\d*)?\}"
ESCAPES = {"a": 7, "f": 12, "t": 9, "n": 10, "r": 13, "v": 11}
DIGIT: Ranges = ((48, 57),)
WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
SPACE: Ranges = ((9, 10), (12, 13), (32, 32))
FOLDED_WORD: Ranges = (*WORD, (0x17F, 0x17F), (0x212A, 0x212A))  # long s, Kelvin sign
PERL = {"d": DIGIT, "w": WORD, "s": SPACE}
POSIX: dict[str, Ranges] = {
    "alnum": ((48, 57), (65, 90), (97, 122)),
    "alpha": ((65, 90), (97, 122)),
    "ascii": ((0, 127),),
    "blank": ((9, 9), (32, 32)),
    "cntrl": ((0, 31), (127, 127)),
    "digit": DIGIT,
    "graph": ((33, 126),),
    "lower": ((97, 122),),
    "print": ((32, 126),),
    "punct": ((33, 47), (58, 64), (91, 96), (123, 126)),
    "space": ((9, 13), (32, 32)),
    "upper": ((65, 90),),
    "word": WORD,
    "xdigit": ((48, 57), (65, 70), (97, 102)),
}


def compile_re2(pattern: str) -> re.Pattern[str]:
    r"""Return a Python pattern that fully matches exactly what ``pattern`` fully matches in RE2.

    Raises:
        UnsupportedOpError: RE2 refuses the pattern, or it needs what Python does not know:
            scripts such as ``\p{Greek}``, and ``\C``.
    """
    return re.compile(_Translator(pattern).translate())


class _Translator:
    """Reads a pattern from left to right; flags are written out at each place they matter."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.flags = frozenset[str]()

    def translate(self) -> str:
        text = self._alternatives()
        if self.at < len(self.pattern):
            raise self._error("unexpected )")
        return text

    def _error(self, problem: str) -> UnsupportedOpError:
        return UnsupportedOpError(
            f"pattern {self.pattern!r}, character {self.at}: {problem} (the syntax is RE2's)"
        )

    def _rest(self, prefix: str) -> bool:
        """Whether ``prefix`` comes next; then step over it."""
        found = self.pattern.startswith(prefix, self.at)
        self.at += len(prefix) if found else 0
        return found

    def _take(self, expression: str) -> re.Match[str] | None:
        """Return the match of ``expression`` that comes next, if any, and step over it."""
        found = re.compile(expression, re.DOTALL).match(self.pattern, self.at)
        if found is not None:
            self.at = found.end()
        return found

    # --- structure -------------------------------------------------------------------------------

    def _alternatives(self) -> str:
        parts: list[str] = []
        while self.at < len(self.pattern) and self.pattern[self.at] != ")":
            if self._rest("|"):
                parts.append("|")
            elif self._rest("\\Q"):
                self._unquote()
            else:
                parts.append(self._repeated())
        return "".join(parts)

    def _repeated(self) -> str:
        atom = self._atom()
        times = self._take(REPEAT)
        if times is None or not atom:
            if times is not None:
                raise self._error("no argument for repetition operator")
            return atom
        if times[0][0] == "{":
            bounds = [int(n) for n in re.findall(r"\d+", times[0])]
            if bounds != sorted(bounds) or bounds[-1] > LARGEST_REPEAT:
                raise self._error(f"bad repetition {times[0]}")
        self._take(r"\?")  # as few as possible: the same whole matches
        if self._take(REPEAT):
            raise self._error("bad repetition operator")
        return f"(?:{atom}){times[0]}"

    def _unquote(self) -> None:
        """Replace quoted text by its escaped characters."""
        start = self.at
        quoted = self._take(r"(.*?)(?:\\E|\Z)")
        assert quoted is not None
        escaped = re.sub(r"[\x00-\x7f](?<![0-9A-Za-z])", r"\\\g<0>", quoted[1])
        self.pattern = self.pattern[:start] + escaped + self.pattern[self.at :]
        self.at = start

    def _group(self) -> str:
        outer = self.flags
        if self._rest("?") and not self._take(r"P?<\w+>"):
            given = self._take(r"([imsU]*)(?:-([imsU]+))?([:)])")
            if given is None:
                raise self._error("invalid or unsupported Perl syntax")
            self.flags = (self.flags | set(given[1])) - set(given[2] or "")
            if given[3] == ")":
                return ""  # to the end of the group around it
        inner = self._alternatives()
        if not self._rest(")"):
            raise self._error("missing )")
        self.flags = outer
        return f"(?:{inner})"

    # --- single things ---------------------------------------------------------------------------

    def _atom(self) -> str:
        char = self.pattern[self.at]
        self.at += 1
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape()
        if char in "*+?":
            raise self._error("no argument for repetition operator")
        lines = "m" in self.flags
        if char == ".":
            return r"(?s:.)" if "s" in self.flags else r"[^\n]"
        if char == "^":
            return "(?m:^)" if lines else r"\A"
        if char == "$":
            return "(?m:$)" if lines else r"\Z"
        return self._ranges(((ord(char), ord(char)),), False)

    def _escape(self) -> str:
        anchors = {"A": r"\A", "z": r"\Z", "b": r"(?a:\b)", "B": r"(?!(?a:\b))"}
        char = self.pattern[self.at : self.at + 1]
        if char in anchors:
            self.at += 1
            return anchors[char]
        found = self._escaped_class()
        if found is not None:
            return self._ranges(*found)
        code = self._escaped_char()
        return self._ranges(((code, code),), False)

    def _escaped_class(self) -> tuple[Ranges, bool] | None:
        """Read what follows a backslash as a class: its ranges and whether they are excluded."""
        perl = self._take("[dDwWsS]")
        if perl is not None:
            ranges = PERL[perl[0].lower()]
            folds = ranges is WORD and "i" in self.flags
            return FOLDED_WORD if folds else ranges, perl[0].isupper()
        category = self._take(r"([pP])(?:\{(\^?)(\w+)\}|(\w))")
        if category is None:
            return None
        name = category[3] or category[4]
        ranges = category_ranges(name)
        if not ranges:
            raise self._error(f"character class {name!r} is not a general category of Unicode")
        return ranges, (category[1] == "P") != (category[2] == "^")

    def _escaped_char(self) -> int:
        octal = self._take(r"0[0-7]{0,2}|[1-7][0-7]{1,2}")
        if octal is not None:
            return int(octal[0], 8)
        hexadecimal = self._take(r"x(?:\{([0-9A-Fa-f]+)\}|([0-9A-Fa-f]{2}))")
        if hexadecimal is not None:
            code = int(hexadecimal[1] or hexadecimal[2], 16)
            if code > sys.maxunicode:
                raise self._error("invalid escape sequence")
            return code
        named = self._take("[aftnrv]")
        if named is not None:
            return ESCAPES[named[0]]
        mark = self._take(r"[\x00-\x7f](?<![0-9A-Za-z])")
        if mark is None:
            raise self._error("invalid escape sequence")
        return ord(mark[0])

    # --- classes ---------------------------------------------------------------------------------

    def _class(self) -> str:
        excluded = self._rest("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or not self._rest("]"):
            if self.at >= len(self.pattern):
                raise self._error("missing ]")
            ranges += self._class_item()
            first = False
        return self._ranges(tuple(ranges), excluded)

    def _class_item(self) -> Ranges:
        posix = self._take(r"\[:(\^?)(\w*):\]")
        if posix is not None:
            if posix[2] not in POSIX:
                raise self._error(f"no character class {posix[0]}")
            ranges = POSIX[posix[2]]
            return complement(ranges) if posix[1] else ranges
        start = self.at
        if self._rest("\\"):
            found = self._escaped_class()
            if found is not None:
                return complement(found[0]) if found[1] else found[0]
            self.at = start
        low = self._class_char()
        if self._take(r"-(?!\])"):
            high = self._class_char()
            if high < low:
                raise self._error("bad range in a character class")
            return ((low, high),)
        return ((low, low),)

    def _class_char(self) -> int:
        if self._rest("\\"):
            return self._escaped_char()
        if self.at >= len(self.pattern):
            raise self._error("missing ]")
        self.at += 1
        return ord(self.pattern[self.at - 1])

    def _ranges(self, ranges: Ranges, excluded: bool) -> str:
        """Write a class; one that holds everything or nothing included."""
        body = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)
        if not body:
            return "(?s:.)" if excluded else "(?!)"
        text = f"[{'^' if excluded else ''}{body}]"
        return f"(?i:{text})" if "i" in self.flags else text


def complement(ranges: Ranges) -> Ranges:
    """Return all code points outside ``ranges``."""
    result, next_code = [], 0
    for low, high in sorted(ranges):
        if low > next_code:
            result.append((next_code, low - 1))
        next_code = max(next_code, high + 1)
    if next_code <= sys.maxunicode:
        result.append((next_code, sys.maxunicode))
    return tuple(result)


@cache
def category_ranges(name: str) -> Ranges:
    """Return the code points of a general category such as ``L`` or ``Lu``; none if unknown."""
    if name == "Any":
        return ((0, sys.maxunicode),)
    result: list[tuple[int, int]] = []
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category == "Cn" or not category.startswith(name):  # RE2 knows no unassigned ones
            continue
        if result and result[-1][1] == code - 1:
            result[-1] = (result[-1][0], code)
        else:
            result.append((code, code))
    return tuple(result)
