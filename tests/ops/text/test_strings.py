"""Text operators against onnxruntime."""

import numpy as np
import onnx
import pytest
from onnx import helper

import qwrap
from qwrap import ops
from qwrap.errors import InputError, UnsupportedOpError
from qwrap.ops.text.re2 import compile_re2


def text(*words: str, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
    return np.array(words, dtype=object).reshape(shape)


def test_concatenation_broadcasts(check) -> None:
    check("StringConcat", 20, [text("a", "", "é"), text("x", "y", "ß")], {})
    check("StringConcat", 20, [text("a", "b", shape=(2, 1)), text("x", "y", "z")], {})
    check("StringConcat", 20, [text("a", shape=()), text("b", shape=())], {})


WORDS = ["a,b,,c", "", ",", "plain", "é,ß,", "x, y"]


@pytest.mark.parametrize("maxsplit", [None, 0, 1, 2, 9, -1])
def test_splitting_at_a_delimiter_equals_onnxruntime(check, maxsplit) -> None:
    attributes = {"delimiter": ","} | ({} if maxsplit is None else {"maxsplit": maxsplit})
    check("StringSplit", 20, [text(*WORDS)], attributes, outputs=2)
    check("StringSplit", 20, [text(*WORDS, shape=(2, 3))], attributes, outputs=2)


@pytest.mark.parametrize("maxsplit", [None, 0, 1, 2, 9])
@pytest.mark.parametrize("attributes", [{}, {"delimiter": ""}])
def test_splitting_at_blanks_equals_onnxruntime(check, attributes, maxsplit) -> None:
    attributes = attributes | ({} if maxsplit is None else {"maxsplit": maxsplit})
    words = text("  a  b c ", "", "   ", "one", "tab\tis no blank", "a b  ")
    check("StringSplit", 20, [words], attributes, outputs=2)
    check("StringSplit", 20, [text("a b", shape=())], attributes, outputs=2)


# What Python reads otherwise: ASCII classes, $ at the very end, {,2} literal, POSIX and Unicode
# classes, inline flags in the middle, quotation, octal and braced codes, greediness turned round.
PATTERNS = [
    *(r"\w+", r"\d*", r"\D", r"\W", r"[^\W]", r"\s", "(?i)k", r"(?i)\w", "(?i)[^s]", "(?i:ß|É)"),
    *("a$", "a$\n", "a\\z", r"(?m)a$\n?", "(?m)^a", r"\Aa", "a{,2}", "a{2}", "a{1,}?", "{"),
    *("[[:alpha:]]+", "[[:^digit:]x]*", "[]a]", "[^]a]", "[a-]", r"\pL", r"\p{Lu}", r"\P{L}"),
    *(r"\p{^Nd}", r"a(?i)b", "(a(?i)b)c", "(?s).", ".", "(?s-s:.)", r"\Qa.b\E+", r"\Qa", "(?U)a+"),
    *(r"\x61", r"\x{e9}", r"\141", r"\07", r"\-", r"\_", r"\bab\b", r"a\B.*", "(?P<n>a)|b", ""),
    *("|a", "(|a)b", "^*a", "()*", "(a*)*", "(?:a|ab)(?:c|bcd)", r"\.", "[\\w.]+@[\\w.]+"),
]
SUBJECTS = text(
    *("", "a", "A", "aa", "ab", "aB", "AB", "aBc", "abc", "abC", "a\n", "\n", "a.b", "a.bb", "axb"),
    *(
        "k",
        "K",
        "\u212a",
        "s",
        "S",
        "\u017f",
        "é",
        "É",
        "ß",
        "ẞ",
        "1",
        "\u0661",
        "_",
        "-",
        "]",
        "b",
    ),
    *("a{,2}", "{", "x", " ", "\v", "\x07", "abcd", "$", "a@b.c", "aé", "aaa", "\u0378"),
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_matches_are_those_of_re2(check, pattern) -> None:
    check("RegexFullMatch", 20, [SUBJECTS], {"pattern": pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(?=a)",
            "(?<!a)",
            r"(a)\1",
            "(?>a)",
            "(?#x)",
            "a**",
            "a{2}{3}",
            "*a",
            "a{1001}",
            "a{2,1}",
        ),
        *(
            "(a",
            "a)",
            "[a",
            "[b-a]",
            "[[:nope:]]",
            r"\Z",
            r"\u0041",
            r"\p{Nope}",
            r"[a-\d]",
            "(?x)a",
        ),
        "\\",
    ],
)
def test_patterns_that_re2_refuses_are_refused(pattern) -> None:
    with pytest.raises(UnsupportedOpError, match="syntax is RE2's"):
        compile_re2(pattern)


def test_a_pattern_of_a_script_is_refused_when_the_model_is_loaded() -> None:
    node = helper.make_node("RegexFullMatch", ["x"], ["y"], pattern=r"\p{Greek}+")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.STRING, ["n"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.BOOL, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(UnsupportedOpError, match=r"RegexFullMatch.*'Greek' is not a general"):
        qwrap.load(model)


DAYS = text("Monday", "tuesday", "MONDAY", "Çelik", "straße", "monday")


@pytest.mark.parametrize("action", ["NONE", "LOWER", "UPPER"])
@pytest.mark.parametrize("sensitive", [0, 1])
@pytest.mark.parametrize("stopwords", [[], ["monday"], ["Monday", "tuesday"]])
def test_normalization_equals_onnxruntime(check, action, sensitive, stopwords) -> None:
    attributes = {"case_change_action": action, "is_case_sensitive": sensitive, "locale": "C.UTF-8"}
    attributes |= {"stopwords": stopwords} if stopwords else {}
    check("StringNormalizer", 10, [DAYS], attributes)
    check("StringNormalizer", 10, [DAYS[None]], attributes)


def test_normalization_that_leaves_no_word_gives_an_empty_one(check) -> None:
    attributes = {"stopwords": ["monday"], "locale": "C.UTF-8"}
    check("StringNormalizer", 10, [text("Monday", "MONDAY")], attributes)
    check("StringNormalizer", 10, [text("Monday", "MONDAY", shape=(1, 2))], attributes)


def test_normalization_refuses_what_it_cannot_do() -> None:
    operator = ops.find("", "StringNormalizer", 10)
    assert operator is not None
    with pytest.raises(UnsupportedOpError, match="rules of its own"):
        operator.bind({"locale": "tr_TR.UTF-8"})
    with pytest.raises(UnsupportedOpError, match="'TITLE' is none of"):
        operator.bind({"case_change_action": "TITLE"})
    with pytest.raises(InputError, match="neither"):
        operator.function(text("a", "b", shape=(2, 1)), **operator.bind({}))
