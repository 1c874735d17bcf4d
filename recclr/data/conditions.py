"""The conditions of ``data.where``: a parser of its own, with typed values.

    condition = test ("and" test)*
    test      = "not null" | operator value | "in" "[" value ("," value)* "]"
    operator  = ">=" | "<=" | "==" | "!=" | ">" | "<"
    value     = number | 'text' | "text" | true | false

A condition is data: nothing of it is evaluated as code or pasted into a query. It is compared in
the type of the column, so that an integer above 2^53 never meets a float.
"""

from __future__ import annotations

import datetime
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl

from recclr.errors import ConfigError

Value = int | float | str | bool

EXAMPLES = (
    'examples: rating = ">= 7"; price = "> 0 and < 100"; country = "== \'France\'"; '
    'kind = "in [\'click\', \'buy\']"; is_product = "== true"; user_id = "not null"'
)
MAX_LENGTH = 10_000

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<operator>>=|<=|==|!=|>|<)
      | (?P<text>'[^']*'|"[^"]*")
      | (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![\w.])
      | (?P<word>[A-Za-z]+)(?!\w)
      | (?P<mark>[\[\],])
    )""",
    re.VERBOSE | re.ASCII,
)
_WORDS = ("and", "in", "not", "null", "true", "false")


@dataclass(frozen=True)
class Comparison:
    """One comparison; ``operator`` is a sign, ``in`` or ``not null``, ``values`` its operands."""

    operator: str
    values: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Condition:
    """Tests on one column that all must hold. ``source`` names the setting, for messages."""

    tests: tuple[Comparison, ...]
    source: str

    def mask(self, column: pl.Series) -> pl.Series:
        """Boolean [n] without nulls; missing values (null and NaN) pass no test.

        Raises:
            ConfigError: a value does not fit the type of the column.
        """
        mask = column.is_not_null()
        if column.dtype.is_float():
            mask &= column.is_not_nan().fill_null(False)
        for test in self.tests:
            if test.operator != "not null":
                mask &= self._compare(column, test).fill_null(False)
        return mask

    def _compare(self, column: pl.Series, test: Comparison) -> pl.Series:
        operator_ = "==" if test.operator == "in" else test.operator
        hits = [self._compare_one(column, operator_, value) for value in test.values]
        mask = hits[0]
        for hit in hits[1:]:
            mask = mask | hit
        return mask

    def _compare_one(self, column: pl.Series, sign: str, value: Value) -> pl.Series:
        compare, dtype = _OPERATORS[sign], column.dtype
        if isinstance(dtype, (pl.Categorical, pl.Enum)):
            column, dtype = column.cast(pl.String), pl.String()
        if isinstance(value, bool):
            fits = dtype == pl.Boolean
        elif isinstance(value, str):
            fits = dtype == pl.String or isinstance(dtype, (pl.Date, pl.Datetime))
        else:
            fits = dtype.is_numeric()
        if not fits:
            raise ConfigError(
                f"{self.source}: the column holds {dtype}, which cannot be compared with {value!r}"
            )
        if isinstance(dtype, (pl.Date, pl.Datetime)):
            moment = pl.lit(self._moment(str(value)), dtype=pl.Datetime("us"))
            return pl.select(compare(pl.lit(_naive_utc(column)), moment)).to_series()
        if dtype.is_integer() and not isinstance(value, str):
            return _compare_integer(column, compare, value)
        if isinstance(dtype, pl.Decimal):
            column, dtype = column.cast(pl.Float64), pl.Float64()
        return pl.select(compare(pl.lit(column), pl.lit(value, dtype=dtype))).to_series()

    def _moment(self, text: str) -> datetime.datetime:
        """Text as a naive time in UTC."""
        try:
            moment = datetime.datetime.fromisoformat(text)
            if moment.tzinfo is not None:
                moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
        except (ValueError, OverflowError) as error:
            raise ConfigError(
                f"{self.source}: {text!r} is no date; write it as '2024-01-31' or "
                "'2024-01-31T12:00:00'"
            ) from error
        return moment


def _naive_utc(column: pl.Series) -> pl.Series:
    dtype = column.dtype
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.Datetime("us"))


def _compare_integer(
    column: pl.Series, compare: Callable[[Any, Any], Any], value: int | float
) -> pl.Series:
    """In the column's own type; a value outside its range gives the same answer on every row."""
    if isinstance(value, float) and not value.is_integer():
        below = math.floor(value)  # x >= 2.5 is x > 2 and x == 2.5 is never true
        if compare in (operator.eq, operator.ne):
            return pl.repeat(compare is operator.ne, len(column), dtype=pl.Boolean, eager=True)
        compare = operator.gt if compare in (operator.ge, operator.gt) else operator.le
        value = below
    value = int(value)
    low, high = _range(column.dtype)
    if low <= value <= high:
        literal = pl.lit(value, dtype=column.dtype)
        return pl.select(compare(pl.lit(column), literal)).to_series()
    answer = bool(compare(low, value))
    return pl.repeat(answer, len(column), dtype=pl.Boolean, eager=True)


def _range(dtype: pl.DataType) -> tuple[int, int]:
    bits = int(re.sub(r"\D", "", str(dtype)))
    return (
        (0, 2**bits - 1)
        if dtype.is_unsigned_integer()
        else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )


def parse_condition(text: str, *, source: str) -> Condition:
    """Parse one condition.

    Args:
        text: such as ``">= 1 and < 5"``.
        source: the setting it comes from, such as ``data.where.rating``.

    Raises:
        ConfigError: anything but a condition; the message says where and gives examples.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(
            f"{source}: a condition of {len(text):,} characters; the most is {MAX_LENGTH:,}"
        )
    return Condition(_Parser(text, source).condition(), source)


class _Parser:
    """Recursive descent over the tokens of one condition."""

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        self.tokens = list(self._tokens())
        self.position = 0

    def _tokens(self) -> list[tuple[str, str]]:
        tokens, start = [], 0
        end = len(self.text.rstrip())
        while start < end:
            match = _TOKEN.match(self.text, start)
            if match is None:
                raise self.error(f"cannot read {self.text[start : start + 20].strip()!r}")
            kind = match.lastgroup or ""
            tokens.append((kind, match.group(kind)))
            start = match.end()
        return tokens

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.source} = {self.text[:200]!r}: {problem}; {EXAMPLES}")

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position] if self.position < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.position += 1
        return token

    def expect(self, word: str) -> None:
        kind, found = self.take()
        if found.lower() != word or kind == "text":
            raise self.error(f"expected {word!r}, found {found or 'the end'!r}")

    def condition(self) -> tuple[Comparison, ...]:
        tests = [self.test()]
        while self.peek()[0] != "end":
            self.expect("and")
            tests.append(self.test())
        return tuple(tests)

    def test(self) -> Comparison:
        kind, found = self.take()
        if kind == "operator":
            return Comparison(found, (self.value(),))
        if kind == "word" and found.lower() == "not":
            self.expect("null")
            return Comparison("not null")
        if kind == "word" and found.lower() == "in":
            return Comparison("in", self.values())
        raise self.error(f"expected an operator, 'in' or 'not null', found {found or 'nothing'!r}")

    def values(self) -> tuple[Value, ...]:
        self.expect("[")
        values = [self.value()]
        while self.peek() == ("mark", ","):
            self.take()
            values.append(self.value())
        self.expect("]")
        if len({type(v) if isinstance(v, (str, bool)) else float for v in values}) > 1:
            raise self.error("the values of a list must be of one type")
        return tuple(values)

    def value(self) -> Value:
        kind, found = self.take()
        if kind == "text":
            return found[1:-1]
        if kind == "number":
            return self.number(found)
        if kind == "word" and found.lower() in ("true", "false"):
            return found.lower() == "true"
        if kind == "word" and found.lower() not in _WORDS:
            raise self.error(f"text must stand in quotes: '{found}'")
        raise self.error(f"expected a value, found {found or 'the end'!r}")

    def number(self, found: str) -> int | float:
        if len(found) > 60:
            raise self.error(f"a number of {len(found)} characters")
        value = int(found) if re.fullmatch(r"[+-]?[0-9]+", found) else float(found)
        if not math.isfinite(value):
            raise self.error(f"{found} is not a finite number")
        return value
