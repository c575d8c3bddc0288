"""Token expressions: a small, safe language for choosing tokens by their columns.

::

    position > 0 and condition == 'terminal'
    0 < offset <= 5 and not special
    token_text in [' the', ' a'] or `my label` != "x"

Grammar, loosest first::

    condition   condition or condition | condition and condition | not condition
                ( condition ) | comparison | a boolean column | true | false
    comparison  value OP value [OP value ...]        OP: == != < <= > >=
                value in [literal, ...] | value not in [literal, ...]
    value       a column's name, bare or in `back quotes` | literal
    literal     12  -0.5  1e-3  'text'  "text"  true  false

Columns are numbers, strings or booleans, and are compared with their own kind only. A missing
number (NaN) equals nothing, is in no list and has no order; ``a != b`` is ``not a == b`` and
``a not in b`` is ``not a in b`` throughout. Strings are ordered by code point. In a string,
``\\'  \\"  \\\\  \\n  \\t`` are escapes. Nothing is ever evaluated as Python.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .errors import ExpressionError, UnknownNameError
from .schema import Categorical

__all__ = ["Expression", "parse"]

MAX_LENGTH = 100_000
"""Characters in an expression; room for a list of many thousand token ids."""

MAX_DEPTH = 32
"""Parentheses inside one another."""

EXAMPLE = "position > 0 and condition == 'terminal'"

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

WORDS = ("and", "or", "not", "in", "true", "false")

Column = np.ndarray | Categorical


@dataclass(frozen=True)
class Expression:
    """A parsed token expression; make one with `parse`.

    Attributes
    ----------
    text : str
        What was parsed.
    columns : frozenset of str
        The columns it asks for.
    """

    text: str
    columns: frozenset[str]
    _condition: _Condition = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def evaluate(self, columns: Mapping[str, Column]) -> np.ndarray:
        """Say for every row whether the condition holds.

        Parameters
        ----------
        columns : mapping of str to ndarray or Categorical
            Columns of one length; only those in `self.columns` are looked at.

        Returns
        -------
        ndarray of bool
            A new array, one value per row.

        Raises
        ------
        UnknownNameError
            A column that is not there.
        ExpressionError
            A column compared with another kind, or used as a condition without being one.

        Examples
        --------
        >>> columns = {"position": np.arange(4), "mark": Categorical.of(["a", "b", "a", "b"])}
        >>> parse("position > 0 and mark == 'b'").evaluate(columns).tolist()
        [False, True, False, True]
        """
        return self._condition.evaluate(_Rows(self, columns)).copy()


def parse(text: str) -> Expression:
    """Read a token expression; see this module's page for the language.

    Raises
    ------
    ExpressionError
        The text is not an expression; the message points at the place.

    Examples
    --------
    >>> sorted(parse("0 < position < 5 and not special").columns)
    ['position', 'special']
    >>> parse("position >")
    Traceback (most recent call last):
        ...
    actstore.errors.ExpressionError: a column or a value is missing here
        position >
                  ^
    Write for example: position > 0 and condition == 'terminal'
    """
    if not isinstance(text, str):
        raise ExpressionError(
            f"a token expression is text, not {type(text).__name__}; write for example: {EXAMPLE}"
        )
    if len(text) > MAX_LENGTH:
        raise ExpressionError(
            f"the token expression has {len(text):,} characters; {MAX_LENGTH:,} are allowed. "
            "Put the choice into a label column, or pass a boolean mask"
        )
    parser = _Parser(text)
    condition = parser.whole()
    return Expression(text, frozenset(parser.columns), condition)


def _error(text: str, at: int, problem: str, hint: str = "") -> ExpressionError:
    """The error, with the place marked; only the neighbourhood is shown of a long text."""
    left = max(0, at - 50)
    shown = "".join(c if c.isprintable() else " " for c in text[left : at + 30])
    return ExpressionError(
        f"{problem}\n    {shown}\n    {' ' * (at - left)}^\n"
        + (hint or f"Write for example: {EXAMPLE}")
    )


# ---------------------------------------------------------------- text -> lexemes


@dataclass(frozen=True)
class _Lexeme:
    kind: str  # number, string, name, word (and, or, ...), operator, mark (parentheses ...), end
    value: Any
    at: int


_LEXEME = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<quoted>`[^`\n]*`)"
    r"|(?P<operator>[=!<>]=|[<>])"
    r"|(?P<mark>[()\[\],-])"
    r"|(?P<string>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")",
    re.DOTALL,
)

_ESCAPES = {"'": "'", '"': '"', "\\": "\\", "n": "\n", "t": "\t"}

_MISTAKES = {
    "=": "equality is written ==",
    "&": "write 'and'",
    "|": "write 'or'",
    "!": "write 'not', or '!=' between two values",
    "~": "write 'not'",
    "'": "this string has no closing '",
    '"': 'this string has no closing "',
    "`": "this column name has no closing `",
    ".": "a column has no attributes",
}


def _lexemes(text: str) -> list[_Lexeme]:
    found = []
    at = 0
    while at < len(text):
        match = _LEXEME.match(text, at)
        if match is None:
            reason = _MISTAKES.get(text[at], "it is no part of the language")
            raise _error(text, at, f"unexpected {text[at]!r}: {reason}")
        if match.lastgroup != "space":
            found.append(_lexeme(text, match))
        at = match.end()
    return [*found, _Lexeme("end", None, len(text))]


def _lexeme(text: str, match: re.Match[str]) -> _Lexeme:
    kind, raw, at = str(match.lastgroup), match[0], match.start()
    if kind == "number":
        return _Lexeme(kind, _number(text, raw, at, match.end()), at)
    if kind == "string":
        return _Lexeme(kind, _unescape(text, raw, at), at)
    if kind == "quoted":
        return _Lexeme("name", raw[1:-1], at)
    if kind == "name" and raw in WORDS:
        return _Lexeme("word", raw, at)
    return _Lexeme(kind, raw, at)


def _number(text: str, raw: str, at: int, end: int) -> int | float:
    if text[end : end + 1].isidentifier() or text[end : end + 1] == ".":
        raise _error(
            text, end, f"the number {raw[:40]} goes on with {text[end]!r}", "Numbers: 12 0.5 1e-3"
        )
    if len(raw) > 100:
        raise _error(text, at, f"a number of {len(raw):,} characters; 100 are allowed")
    return int(raw) if raw.isdigit() else float(raw)


def _unescape(text: str, raw: str, at: int) -> str:
    def one(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            known = "\\' \\\" \\\\ \\n \\t"
            raise _error(
                text,
                at + 1 + match.start(),
                f"unknown escape {match[0]!r} in a string",
                f"Known: {known}. Write \\\\ for one backslash.",
            )
        return _ESCAPES[match[1]]

    return re.sub(r"\\(.)", one, raw[1:-1], flags=re.DOTALL)


# ---------------------------------------------------------------- lexemes -> conditions


class _Parser:
    """Precedence climbing over ``or`` (1), ``and`` (2), ``not`` (3), comparisons (4).

    Runs of the same word are folded in a loop, so only parentheses recurse.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.lexemes = _lexemes(text)
        self.next = 0
        self.depth = 0
        self.columns: set[str] = set()

    @property
    def here(self) -> _Lexeme:
        return self.lexemes[self.next]

    def sees(self, kind: str, value: str, ahead: int = 0) -> bool:
        lexeme = self.lexemes[min(self.next + ahead, len(self.lexemes) - 1)]
        return lexeme.kind == kind and lexeme.value == value

    def takes(self, kind: str, value: str) -> bool:
        """Step over the next lexeme if it is this one."""
        if not self.sees(kind, value):
            return False
        self.next += 1
        return True

    def error(self, problem: str, lexeme: _Lexeme | None = None, hint: str = "") -> ExpressionError:
        return _error(self.text, (lexeme or self.here).at, problem, hint)

    def whole(self) -> _Condition:
        if self.here.kind == "end":
            raise self.error("the token expression is empty")
        condition = self.condition(self.junction("or"))
        if self.here.kind != "end":
            if self.sees("mark", "("):
                raise self.error("nothing can be called: there are no functions")
            raise self.error("'and' or 'or' is missing here, or this is one too many")
        return condition

    def junction(self, word: str) -> _Condition | _Value:
        """Terms joined by 'or', or (tighter) by 'and'."""
        operand = partial(self.junction, "and") if word == "or" else self.negation
        first = operand()
        if not self.sees("word", word):
            return first
        terms = [self.condition(first)]
        while self.takes("word", word):
            terms.append(self.condition(operand()))
        return _Joined(word, tuple(terms))

    def negation(self) -> _Condition | _Value:
        negations = 0
        while self.takes("word", "not"):
            negations += 1
        inner = self.comparison()
        if not negations:
            return inner
        condition = self.condition(inner)
        return _Not(condition) if negations % 2 else condition

    def comparison(self) -> _Condition | _Value:
        left = self.primary()
        if self.membership_follows():
            return self.membership(self.value(left))
        links: list[_Condition] = []
        while self.here.kind == "operator":
            symbol = self.here
            self.next += 1
            right = self.value(self.primary())
            links.append(_Compare(self.value(left), symbol.value, right, symbol.at))
            left = right
        if links and self.membership_follows():
            raise self.error(
                "'in' cannot be chained to another comparison; join the two with 'and'"
            )
        if len(links) > 1:
            return _Joined("and", tuple(links))
        return links[0] if links else left

    def membership_follows(self) -> bool:
        return self.sees("word", "in") or (
            self.sees("word", "not") and self.sees("word", "in", ahead=1)
        )

    def membership(self, left: _Value) -> _Condition:
        at = self.here.at
        negated = self.takes("word", "not")
        self.takes("word", "in")
        hint = "A list is written: token_id in [11, 13]"
        if not self.takes("mark", "["):
            raise self.error("'in' is followed by a list", hint=hint)
        members: list[_Literal] = []
        while not self.takes("mark", "]"):
            member = None if self.sees("mark", "(") else self.primary()
            if not isinstance(member, _Literal):
                raise self.error("a list holds only numbers, strings, true and false", hint=hint)
            members.append(member)
            if not self.takes("mark", ",") and not self.sees("mark", "]"):
                raise self.error("',' or ']' is missing in this list", hint=hint)
        if self.here.kind == "operator" or self.membership_follows():
            raise self.error(
                "'in' cannot be chained to another comparison; join the two with 'and'"
            )
        found = _Member(left, tuple(members), at)
        return _Not(found) if negated else found

    def primary(self) -> _Condition | _Value:
        lexeme = self.here
        self.next += lexeme.kind != "end"
        if lexeme.kind == "name":
            self.columns.add(lexeme.value)
            return _Name(lexeme.value, lexeme.at)
        if lexeme.kind in ("number", "string"):
            return _Literal(lexeme.value, lexeme.at)
        if lexeme.value in ("true", "false"):
            return _Literal(lexeme.value == "true", lexeme.at)
        if lexeme.value == "-":
            return self.negative(lexeme)
        if lexeme.value == "(":
            return self.parenthesis(lexeme)
        if lexeme.kind == "end" or lexeme.value in (")", "]", ",", "and", "or", "in"):
            raise self.error("a column or a value is missing here", lexeme)
        raise self.error(f"unexpected {lexeme.value!r}", lexeme)

    def negative(self, minus: _Lexeme) -> _Literal:
        number = self.here
        if number.kind != "number":
            raise self.error("'-' stands only before a number: there is no arithmetic", minus)
        self.next += 1
        return _Literal(-number.value, minus.at)

    def parenthesis(self, opening: _Lexeme) -> _Condition | _Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} parentheses inside one another", opening)
        inner = self.junction("or")
        if not self.takes("mark", ")"):
            raise self.error("')' is missing here")
        self.depth -= 1
        return inner

    def value(self, node: _Condition | _Value) -> _Value:
        if isinstance(node, _Name | _Literal):
            return node
        raise self.error(
            "a condition cannot be compared: only columns and values can",
            hint="Join conditions with 'and' and 'or', turn one round with 'not'.",
        )

    def condition(self, node: _Condition | _Value) -> _Condition:
        if isinstance(node, _Name):
            return _Flag(node)
        if not isinstance(node, _Literal):
            return node
        if not isinstance(node.value, bool):
            raise _error(
                self.text, node.at, "a value alone is not a condition: compare it with a column"
            )
        return _Constant(node.value)


# ---------------------------------------------------------------- conditions -> rows


class _Rows:
    """The columns that an expression is evaluated over."""

    def __init__(self, expression: Expression, columns: Mapping[str, Column]) -> None:
        self.text = expression.text
        for name in sorted(expression.columns):
            if name not in columns:
                raise UnknownNameError("column", name, columns, f"Write for example: {EXAMPLE}")
        self._raw = {n: columns[n] for n in expression.columns or list(columns)[:1]}
        lengths = {name: len(column) for name, column in self._raw.items()}
        if len(set(lengths.values())) > 1:
            raise ExpressionError(f"the columns have different lengths: {lengths}")
        self.count = next(iter(lengths.values()), 0)
        self._ready: dict[str, Column] = {}

    def column(self, name: _Name) -> Column:
        if name.value not in self._ready:
            self._ready[name.value] = self._plain(name)
        return self._ready[name.value]

    def _plain(self, name: _Name) -> Column:
        """The column with its values as numbers, strings (as objects) or booleans."""
        column = self._raw[name.value]
        if isinstance(column, Categorical):
            return Categorical(np.asarray(column.codes), self._values(name, column.values))
        return self._values(name, column)

    def _values(self, name: _Name, values: Any) -> np.ndarray:
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            return array
        if array.dtype.kind in "UT":
            return array.astype(object)
        if array.dtype.kind == "O":
            listed = ["" if v is None else v for v in array.tolist()]
            if all(isinstance(v, str) for v in listed):
                strings = np.empty(len(listed), dtype=object)
                strings[:] = listed
                return strings
        raise _error(
            self.text,
            name.at,
            f"column {name.value!r} ({array.dtype}) is not of numbers, strings or booleans",
            "Leave it out of the expression.",
        )


@dataclass(frozen=True)
class _Name:
    value: str
    at: int

    def kind(self, rows: _Rows) -> str:
        column = rows.column(self)
        return _kind(column.values if isinstance(column, Categorical) else column)

    def describe(self, rows: _Rows) -> str:
        return f"column {self.value!r} ({self.kind(rows)})"


@dataclass(frozen=True)
class _Literal:
    value: Any
    at: int

    def kind(self, rows: _Rows) -> str:
        if isinstance(self.value, bool):
            return "boolean"
        return "string" if isinstance(self.value, str) else "number"

    def describe(self, rows: _Rows) -> str:
        shown = repr(self.value) if not isinstance(self.value, bool) else str(self.value).lower()
        return f"the {self.kind(rows)} {shown[:60]}"


_Value = _Name | _Literal


def _kind(array: np.ndarray) -> str:
    return {"b": "boolean", "O": "string"}.get(array.dtype.kind, "number")


@dataclass(frozen=True)
class _Constant:
    value: bool

    def evaluate(self, rows: _Rows) -> np.ndarray:
        return np.full(rows.count, self.value)


@dataclass(frozen=True)
class _Flag:
    name: _Name

    def evaluate(self, rows: _Rows) -> np.ndarray:
        column = rows.column(self.name)
        if (kind := self.name.kind(rows)) != "boolean":
            shown = (
                f"`{self.name.value}`" if not self.name.value.isidentifier() else self.name.value
            )
            raise _error(
                rows.text,
                self.name.at,
                f"column {self.name.value!r} is a {kind} column, so it is not a condition",
                f"Compare it: {shown} " + ("> 0" if kind == "number" else "== 'text'"),
            )
        return column.decode() if isinstance(column, Categorical) else column


@dataclass(frozen=True)
class _Not:
    term: _Condition

    def evaluate(self, rows: _Rows) -> np.ndarray:
        return ~self.term.evaluate(rows)


@dataclass(frozen=True)
class _Joined:
    """Two or more conditions; one node however many, so that long chains do not recurse."""

    word: str
    terms: tuple[_Condition, ...]

    def evaluate(self, rows: _Rows) -> np.ndarray:
        join = np.logical_or if self.word == "or" else np.logical_and
        found = self.terms[0].evaluate(rows)
        for term in self.terms[1:]:
            found = join(found, term.evaluate(rows))
        return found


@dataclass(frozen=True)
class _Compare:
    left: _Value
    symbol: str
    right: _Value
    at: int

    def evaluate(self, rows: _Rows) -> np.ndarray:
        if self.left.kind(rows) != self.right.kind(rows):
            raise _error(
                rows.text,
                self.at,
                f"{self.left.describe(rows)} cannot be compared with {self.right.describe(rows)}",
                "Strings are written in quotes, numbers and true, false without.",
            )
        left, right = _operand(self.left, rows), _operand(self.right, rows)
        compare = OPERATORS[self.symbol]
        if isinstance(left, Categorical) and not isinstance(right, np.ndarray | Categorical):
            return _spread(compare(left.values, right), left)
        if isinstance(right, Categorical) and not isinstance(left, np.ndarray | Categorical):
            return _spread(compare(left, right.values), right)
        left = left.decode() if isinstance(left, Categorical) else left
        right = right.decode() if isinstance(right, Categorical) else right
        with np.errstate(over="ignore"):  # a number beyond a narrow column's range: inf is right
            found = compare(left, right)
        return np.broadcast_to(np.asarray(found, dtype=bool), (rows.count,))


@dataclass(frozen=True)
class _Member:
    left: _Value
    members: tuple[_Literal, ...]
    at: int

    def evaluate(self, rows: _Rows) -> np.ndarray:
        kind = self.left.kind(rows)
        for member in self.members:
            if member.kind(rows) != kind:
                raise _error(
                    rows.text,
                    member.at,
                    f"{self.left.describe(rows)} cannot be compared with {member.describe(rows)}",
                    "Strings are written in quotes, numbers and true, false without.",
                )
        values = [member.value for member in self.members]
        left = _operand(self.left, rows)
        if isinstance(left, Categorical):
            return _spread(_among(left.values, values), left)
        if isinstance(left, np.ndarray):
            return _among(left, values)
        return np.full(rows.count, left in values)


_Condition = _Constant | _Flag | _Not | _Joined | _Compare | _Member


def _operand(value: _Value, rows: _Rows) -> Any:
    return value.value if isinstance(value, _Literal) else rows.column(value)


def _spread(table: Any, column: Categorical) -> np.ndarray:
    """From an answer per distinct value to one per row."""
    return np.asarray(table, dtype=bool)[column.codes]


def _among(column: np.ndarray, values: list[Any]) -> np.ndarray:
    """As ``column == v`` for any of the values, in one pass however many there are."""
    kind = column.dtype.kind
    if kind == "O":
        wanted = set(values)
        return np.fromiter((v in wanted for v in column), bool, len(column))
    if kind in "iu":  # whole numbers are looked up exactly; others equal none of them
        limits = np.iinfo(column.dtype)
        whole = [int(v) for v in values if abs(v) < 2.0**64 and v == int(v)]
        values = [v for v in whole if limits.min <= v <= limits.max]
    with np.errstate(over="ignore"):
        return np.isin(column, np.array(values, dtype=column.dtype))
