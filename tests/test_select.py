"""Token expressions: what they mean, and that nothing else gets through."""

from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actstore.errors import ExpressionError, UnknownNameError
from actstore.schema import Categorical
from actstore.select import MAX_DEPTH, MAX_LENGTH, parse

ROWS = 40
random = np.random.default_rng(0)
WORDS = ["the", " a", "it's", 'say "so"', "back\\slash", "tab\t", "new\nline", "ümlaut", ""]

COLUMNS: dict[str, Any] = {
    "position": np.arange(ROWS) % 7,
    "token_id": random.integers(0, 5, ROWS).astype(np.int32),
    "small": random.integers(0, 255, ROWS).astype(np.uint8),
    "loss": np.where(random.random(ROWS) < 0.2, np.nan, random.normal(size=ROWS)),
    "offset": random.integers(-3, 3, ROWS).astype(np.float32),
    "special": random.random(ROWS) < 0.5,
    "my flag": random.random(ROWS) < 0.5,
    "token_text": Categorical.of(random.choice(np.array(WORDS, object), ROWS).tolist()),
    "condition": Categorical.of(random.choice(["internal", "terminal"], ROWS).tolist()),
    "play": random.choice(["Hamlet", "Lear"], ROWS),
    "and": np.array([None if i % 3 else "gap" for i in range(ROWS)], dtype=object),
}


def kind(values: Any) -> str:
    return {"b": "boolean", "U": "string", "O": "string"}.get(values.dtype.kind, "number")


def plain(name: str) -> np.ndarray:
    """A column as numpy users would have it."""
    column = COLUMNS[name]
    values = column.decode() if isinstance(column, Categorical) else column
    if kind(values) != "string":
        return values
    return np.array(["" if v is None else str(v) for v in values])


def spelt(name: str) -> str:
    return name if name.isidentifier() and name != "and" else f"`{name}`"


def quoted(text: str) -> str:
    mark = "'" if len(text) % 2 else '"'
    for raw, escape in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), (mark, "\\" + mark)):
        text = text.replace(raw, escape)
    return mark + text + mark


# Every strategy makes pairs: the text of an expression, and what numpy says it means.

LITERALS = {
    "number": st.one_of(
        st.integers(-10, 10),
        st.integers(),
        st.sampled_from([0.5, -1.25, 1e-3, 2.0, 1e300]),
        st.floats(allow_nan=False, allow_infinity=False),
    ).map(lambda v: (repr(v), v)),
    "string": st.one_of(st.sampled_from(WORDS), st.text(max_size=4)).map(lambda v: (quoted(v), v)),
    "boolean": st.booleans().map(lambda v: (str(v).lower(), v)),
}
LITERALS["number"] = LITERALS["number"].filter(lambda pair: len(pair[0]) < 100)

OPERATORS = {
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}


def compared(symbol: str, left: Any, right: Any) -> np.ndarray:
    if any(np.asarray(v).dtype.kind == "U" for v in (left, right)):
        left, right = np.asarray(left, object), np.asarray(right, object)
    with np.errstate(over="ignore"):
        return np.broadcast_to(np.asarray(OPERATORS[symbol](left, right), bool), ROWS)


names = st.sampled_from(sorted(COLUMNS))


@st.composite
def chains(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    first = draw(names)
    same = [n for n in sorted(COLUMNS) if kind(plain(n)) == kind(plain(first))]
    value = st.one_of(
        st.sampled_from(same).map(lambda n: (spelt(n), plain(n))), LITERALS[kind(plain(first))]
    )
    text, left = draw(value)
    found = np.ones(ROWS, bool)
    for symbol in draw(st.lists(st.sampled_from(sorted(OPERATORS)), min_size=1, max_size=3)):
        more, right = draw(value)
        text = f"{text} {symbol} {more}"
        found = found & compared(symbol, left, right)
        left = right
    return text, found


@st.composite
def members(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    name = draw(names)
    values = plain(name)
    listed = draw(st.lists(LITERALS[kind(values)], max_size=4))
    found = np.zeros(ROWS, bool)
    for _, value in listed:
        found = found | compared("==", values, value)
    negated = draw(st.booleans())
    text = f"{spelt(name)} {'not in' if negated else 'in'} [{', '.join(t for t, _ in listed)}]"
    return text, ~found if negated else found


flags = st.sampled_from(["special", "my flag"]).map(lambda n: (spelt(n), plain(n)))
constants = st.booleans().map(lambda v: (str(v).lower(), np.full(ROWS, v)))


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        inner.map(lambda a: (f"not ({a[0]})", ~a[1])),
        inner.map(lambda a: (f"( {a[0]} )", a[1])),
        st.tuples(inner, inner).map(lambda p: (f"({p[0][0]}) and ({p[1][0]})", p[0][1] & p[1][1])),
        st.tuples(inner, inner).map(lambda p: (f"({p[0][0]}) or({p[1][0]})", p[0][1] | p[1][1])),
    )


expressions = st.recursive(st.one_of(chains(), members(), flags, constants), grown, max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_an_expression_means_what_numpy_says(pair: tuple[str, np.ndarray]) -> None:
    text, expected = pair
    found = parse(text).evaluate(COLUMNS)
    assert found.dtype == bool and found.shape == (ROWS,)
    np.testing.assert_array_equal(found, expected, err_msg=text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["and", "or"]), st.booleans(), flags), min_size=1))
def test_not_binds_tighter_than_and_than_or(terms: list[Any]) -> None:
    words = [f"{word} {'not ' if negated else ''}{name}" for word, negated, (name, _) in terms]
    text = " ".join(words).partition(" ")[2]  # the first word joins nothing
    python = text.replace("`my flag`", "f")
    rows = [
        eval(python, {}, {"special": bool(s), "f": bool(f)})
        for s, f in zip(COLUMNS["special"], COLUMNS["my flag"], strict=True)
    ]
    np.testing.assert_array_equal(parse(text).evaluate(COLUMNS), rows)


SCRAPS = r"""
position special token_text nowhere and or not in true false ( ) [ ] , - == != < <= > >= = & | 1
0.5 1e 1_0 .5 'a' "b" ' \ ` `special` . : ; # @ lambda __class__ é ²
"""
pieces = st.lists(st.sampled_from([*SCRAPS.split(), "\x00", "\n"]), max_size=12).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), pieces))
@example("special is true")
@example("position ** 2")
@example("'\\x41' == token_text")
@example("\ud800")
@example("token_text in ['a' ']']")
@example("token_text in ['(']")
def test_any_other_text_is_refused_with_our_errors_only(text: str) -> None:
    try:
        found = parse(text).evaluate(COLUMNS)
    except (ExpressionError, UnknownNameError) as error:
        assert str(error)
    else:
        assert found.dtype == bool and found.shape == (ROWS,)


HOSTILE = {
    "open": "(" * 99_999,
    "nested": "(" * 49_000 + "special" + ")" * 49_000,
    "lists": "special in " + "[" * 99_000,
    "strings": "'" + "\\'" * 49_000,
    "number": "position == " + "9" * 90_000,
    "minus": "-" * 99_999,
    "backslashes": "token_text == '" + "\\" * 90_001,
    "too long": "special and " * 20_000 + "special",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused_quickly(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert time.perf_counter() - started < 2
    assert len(str(caught.value)) < 400


def test_long_chains_are_no_nesting() -> None:
    many = 8_000
    for text in (
        " and ".join(["special"] * many),
        " or ".join(["special"] * many),
        "not " * 2 * many + "special",
        f"special and position in [{', '.join(['1'] * 2 * many)}, 0, 2, 3, 4, 5, 6]",
    ):
        assert len(text) < MAX_LENGTH
        np.testing.assert_array_equal(parse(text).evaluate(COLUMNS), COLUMNS["special"])
    chain = parse(" <= ".join(["position"] * many))
    assert chain.evaluate({"position": COLUMNS["position"]}).all()


def test_parentheses_may_nest_as_deep_as_the_page_says() -> None:
    assert parse("(" * MAX_DEPTH + "special" + ")" * MAX_DEPTH).columns == {"special"}
    with pytest.raises(ExpressionError, match="parentheses"):
        parse("(" * (MAX_DEPTH + 1) + "special" + ")" * (MAX_DEPTH + 1))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "position.__class__ == 1",
        "special and exec('1')",
        "(lambda: 1)()",
        "token_text[0] == 'a'",
        "[x for x in token_text]",
        "f'{position}' == 'a'",
        "position := 3",
        "special; special",
    ],
)
def test_no_python_is_reachable(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"\^"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "problem", "column"),
    [
        ("", "empty", 0),
        ("position >", "missing", 10),
        ("position = 3", "written ==", 9),
        ("special & special", "write 'and'", 8),
        ("special || special", "write 'or'", 8),
        ("!special", "write 'not'", 0),
        ("(position > 3", r"'\)' is missing", 13),
        ("position > 3 4", "'and' or 'or' is missing", 13),
        ("position in (1, 2)", "followed by a list", 12),
        ("position in [1 2]", "missing in this list", 15),
        ("position in [token_id]", "holds only", 21),
        ("0 < position in [1]", "chained", 13),
        ("position in [1] == special", "chained", 16),
        ("(position > 1) == true", "a condition cannot be compared", 22),
        ("3", "not a condition", 0),
        ("special and 'x'", "not a condition", 12),
        ("-position > 3", "no arithmetic", 0),
        ("position > 1_000", "goes on with '_'", 12),
        ("token_text == 'it", "no closing '", 14),
        ("token_text == 'a\\q'", "unknown escape", 16),
        ("`my flag", "no closing `", 0),
    ],
)
def test_a_mistake_is_shown_where_it_is(text: str, problem: str, column: int) -> None:
    with pytest.raises(ExpressionError, match=problem) as caught:
        parse(text)
    _, shown, marker, hint = str(caught.value).split("\n")
    assert shown == f"    {text}" and marker == " " * (4 + column) + "^" and hint


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("condition > 3", r"'condition' \(string\) cannot be compared with the number 3"),
        ("'a' == position", r"the string 'a' cannot be compared with column 'position' \(number\)"),
        ("position in [1, 'a']", "the string 'a'"),
        ("special == 1", r"'special' \(boolean\)"),
        ("position == token_text", r"'token_text' \(string\)"),
        ("position and special", "'position' is a number column.*"),
        ("condition", "'condition' is a string column"),
        ("when == 1", "'when' .* is not of numbers, strings or booleans"),
        ("mixed == 1", "'mixed' .* is not of numbers"),
    ],
)
def test_kinds_are_not_mixed(text: str, problem: str) -> None:
    columns = {
        **COLUMNS,
        "when": np.zeros(ROWS, "datetime64[s]"),
        "mixed": np.array([1, "a"] * (ROWS // 2), dtype=object),
    }
    with pytest.raises(ExpressionError, match=problem):
        parse(text).evaluate(columns)


def test_an_unknown_column_lists_those_that_are_there() -> None:
    with pytest.raises(UnknownNameError, match=r"'positon'.*did you mean 'position'.*condition"):
        parse("positon > 3").evaluate(COLUMNS)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ExpressionError, match="different lengths"):
        parse("a == b").evaluate({"a": np.arange(3), "b": np.arange(4)})


def test_not_text_is_refused() -> None:
    with pytest.raises(ExpressionError, match="not ndarray"):
        parse(np.ones(3, bool))  # type: ignore[arg-type]


def test_the_result_is_a_new_array() -> None:
    special = COLUMNS["special"].copy()
    found = parse("special").evaluate({"special": special})
    found[:] = False
    np.testing.assert_array_equal(special, COLUMNS["special"])
    assert parse("true").evaluate(COLUMNS).flags.writeable


def test_missing_numbers_have_no_order_and_equal_nothing() -> None:
    columns = {"loss": np.array([np.nan, 1.0])}
    for text in ("loss == loss", "loss < 9", "loss >= 0", "loss in [1.0]"):
        assert parse(text).evaluate(columns).tolist() == [False, True], text
    assert parse("loss != loss").evaluate(columns).tolist() == [True, False]


def test_a_category_nobody_has_is_no_mistake() -> None:
    assert not parse("condition == 'nowhere'").evaluate(COLUMNS).any()
    assert parse("condition != 'nowhere'").evaluate(COLUMNS).all()


def test_a_category_is_compared_once_per_distinct_value() -> None:
    compared = 0

    class Counted(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    values = np.array([Counted("a"), Counted("b")], dtype=object)
    column = Categorical(np.zeros(10_000, np.int32), values)
    assert parse("mark == 'a'").evaluate({"mark": column}).all()
    assert compared <= 2


def test_no_rows_and_no_columns() -> None:
    empty = {"a": np.zeros(0), "b": Categorical(np.zeros(0, np.int32), np.zeros(0, object))}
    assert parse("a > 0 and b == 'x'").evaluate(empty).shape == (0,)
    assert parse("true").evaluate({}).shape == (0,)
    assert parse("1 in [1, 2] and 'a' not in ['b'] and 1 < 2").evaluate(COLUMNS).all()


def test_an_expression_travels_and_says_what_it_needs() -> None:
    expression = pickle.loads(pickle.dumps(parse("0 < position < 5 and not `my flag`")))
    assert expression.columns == {"position", "my flag"}
    assert str(expression) == expression.text == "0 < position < 5 and not `my flag`"
    assert expression == parse(expression.text)
    expected = (COLUMNS["position"] > 0) & (COLUMNS["position"] < 5) & ~COLUMNS["my flag"]
    np.testing.assert_array_equal(expression.evaluate(COLUMNS), expected)
