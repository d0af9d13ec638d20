"""Numbers as people read them."""

import math
from typing import Any

MISSING = "—"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: Any) -> float | None:
    """`value` as a float, or None when it is no finite number (booleans are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: Any) -> str:
    """A share in [0, 1] as `84.2%`."""
    number = finite(value)
    return MISSING if number is None else _minus(f"{number * 100:.1f}%")


def points(value: Any) -> str:
    """A difference of two shares in percentage points, always signed: `+31.6`."""
    number = finite(value)
    return MISSING if number is None else _minus(f"{number * 100 + 0.0:+.1f}")


def count(value: Any) -> str:
    """A whole number with thousands separated."""
    number = finite(value)
    return MISSING if number is None else _minus(f"{number:,.0f}")


def plain(value: Any, digits: int = 4) -> str:
    """Any number to `digits` significant digits, without trailing zeros."""
    number = finite(value)
    if number is None:
        return MISSING
    if number != 0 and not 1e-4 <= abs(number) < 1e6:
        mantissa, exponent = f"{number:.{digits - 2}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return _minus(f"{mantissa} × 10") + str(int(exponent)).translate(_SUPERSCRIPT)
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(number))) if number else 0))
    written = f"{number:,.{decimals}f}"
    return _minus(written.rstrip("0").rstrip(".") if "." in written else written)


def p_value(value: Any) -> str:
    """A p-value to two significant digits: `0.0031`, `1.2 × 10⁻³¹`."""
    number = finite(value)
    if number is None:
        return MISSING
    if number < 1e-4 and number > 0:
        return plain(number, 3)
    return f"{number:.2g}" if number < 0.1 else f"{number:.2f}"


def duration(seconds: Any) -> str:
    """Seconds as `0.4 s`, `42 s`, `3 min 12 s` or `2 h 05 min`."""
    number = finite(seconds)
    if number is None:
        return MISSING
    if number < 10:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count_of_bytes: Any) -> str:
    """Bytes in decimal units: `1.9 GB`."""
    number = finite(count_of_bytes)
    if number is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def written(value: Any, unit: str) -> str:
    """`value` in the way that a chart's unit asks for: share, seconds, bytes, tokens or number."""
    form = {"share": _share, "seconds": duration, "bytes": size, "count": count}.get(unit, plain)
    return form(value)


def _share(value: Any) -> str:
    number = finite(value)
    return f"{number * 100:.2f}%" if number and abs(number) < 0.01 else percent(number)


def _minus(number: str) -> str:
    return number.replace("-", "−")
