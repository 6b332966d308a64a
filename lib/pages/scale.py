"""scale: where values lie along an axis of pixels, and how they are written."""
import math


class Scale:
    """Maps values to pixels along an axis; ticks are round values; snap: the axis ends at two of them."""

    def __init__(self, values, start, end, snap=True):
        low, high = min(values), max(values)
        if 0 <= low <= high / 2:
            low = 0
        if high - low <= 1e-9 * max(abs(high), abs(low)):  # one value: give it room on both sides
            room = abs(low) / 2 or 1
            low, high = low - room, high + room
        step = round_step((high - low) / 5)
        rounds = [n * step for n in range(math.floor(low / step), math.ceil(high / step) + 1)]
        slack = 1e-9 * (high - low)
        if snap:
            low = max(value for value in rounds if value <= low + slack)
            high = min(value for value in rounds if value >= high - slack)
        self.ticks = [value for value in rounds if low - slack <= value <= high + slack]
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value):
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def round_step(step):
    """The smallest of …, 0.5, 1, 2, 5, 10, 20, … that is no smaller than step."""
    step = max(step, 1e-300)
    power = 10 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= step * (1 - 1e-9))


def number(value, digits=9):
    """A number as short text: 1,024 and 12.5k, 0.05 and 2e-4."""
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e15:
        mantissa, exponent = f"{value:.{min(digits, 3) - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:,.{digits}g}"
