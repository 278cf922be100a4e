"""Questions that a declared function answers: the calendar, units, weather and clocks.

Names of functions and of their arguments vary, so that the declaration must be read. Results are computed here.
"""

import datetime
import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, NamedTuple

from demo.question import is_held_out, one_of, thinking

FIRST_DAY, DAYS = datetime.date(2020, 1, 1), 4017
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Athens Oslo Stockholm Helsinki Moscow Kyiv "
    "Tokyo Beijing Seoul Delhi Mumbai Singapore Sydney Melbourne Cairo Lagos Nairobi Toronto Boston Chicago Seattle "
    "Miami Dallas Denver Houston Austin Lima Santiago Geneva Zurich"
).split()
SKIES = ("rain", "snow", "sun", "clouds", "wind", "fog")
UNITS: Mapping[tuple[str, str], Callable[[float], float]] = {
    ("miles", "kilometers"): lambda x: x * 1.609344,
    ("kilometers", "miles"): lambda x: x / 1.609344,
    ("feet", "meters"): lambda x: x * 0.3048,
    ("meters", "feet"): lambda x: x / 0.3048,
    ("inches", "centimeters"): lambda x: x * 2.54,
    ("centimeters", "inches"): lambda x: x / 2.54,
    ("pounds", "kilograms"): lambda x: x * 0.45359237,
    ("kilograms", "pounds"): lambda x: x / 0.45359237,
    ("ounces", "grams"): lambda x: x * 28.349523125,
    ("grams", "ounces"): lambda x: x / 28.349523125,
    ("gallons", "liters"): lambda x: x * 3.785411784,
    ("liters", "gallons"): lambda x: x / 3.785411784,
    ("fahrenheit", "celsius"): lambda x: (x - 32) / 1.8,
    ("celsius", "fahrenheit"): lambda x: x * 1.8 + 32,
}


class Call(NamedTuple):
    """A question that a function answers.

    Attributes:
        family: "calendar", "conversion" or "lookup".
        text: what the user says.
        tool: the function's declaration, in OpenAI's form.
        arguments: right ones.
        result: what the function gives for them.
        sentence: the answer with the result in it.
        thoughts: effort -> what stands on the analysis channel before the call.
    """

    family: str
    text: str
    tool: dict[str, Any]
    arguments: dict[str, Any]
    result: dict[str, Any]
    sentence: str
    thoughts: Mapping[str, str]

    @property
    def name(self) -> str:
        """The function's."""
        return self.tool["function"]["name"]

    @property
    def written_arguments(self) -> str:
        """As the model is to write them."""
        return compact(self.arguments)


def compact(value: object) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def calendar(random: Random, held_out: bool) -> Call:
    """A weekday, days between two dates, or a date some days after another."""
    return random.choice((_weekday, _days_between, _days_after))(random, held_out)


def conversion(random: Random, held_out: bool) -> Call:
    """A number of one unit in another."""
    while True:
        source, target = random.choice(list(UNITS))
        value = random.randint(1, 300) if random.random() < 0.85 else random.randint(1, 99) / 10
        if is_held_out("conversion", value, source, target) == held_out:
            break
    text = one_of(
        random,
        f"Convert {value} {source} to {target}.",
        f"How many {target} are {value} {source}?",
        f"What is {value} {source} in {target}?",
        f"{value} {source} in {target}?",
    )
    names = one_of(random, "value from_unit to_unit", "amount source target", "number from to").split()
    arguments = dict(zip(names, (value, source, target), strict=True))
    tool = _declare(
        one_of(random, "convert", "convert_units", "unit_converter"),
        "Converts a number from a unit to another.",
        dict(zip(names, ("number", "string", "string"), strict=True)),
    )
    result = round(UNITS[source, target](value), 2)
    sentence = f"{value} {source} are {result} {target}."
    return _call("conversion", text, tool, arguments, {"result": result}, sentence)


def lookup(random: Random, held_out: bool) -> Call:
    """The weather or the time in a city."""
    return random.choice((_weather, _clock))(random, held_out)


MAKERS = {"calendar": calendar, "conversion": conversion, "lookup": lookup}


# ---- the calendar ----


def _weekday(random: Random, held_out: bool) -> Call:
    date = _date(random, held_out, "weekday")
    said = _said(random, date)
    text = one_of(
        random, f"What day of the week is {said}?", f"Which weekday is {said}?", f"On which day of the week is {said}?"
    )
    name = one_of(random, "date", "day")
    tool = _declare(
        one_of(random, "weekday", "get_weekday", "day_of_week"),
        "Gives the day of the week of a date, YYYY-MM-DD.",
        {name: "string"},
    )
    weekday = f"{date:%A}"
    return _call("calendar", text, tool, {name: str(date)}, {"weekday": weekday}, f"{said} is a {weekday}.")


def _days_between(random: Random, held_out: bool) -> Call:
    start = _date(random, held_out, "days_between")
    days = random.randint(1, 999)
    end = start + datetime.timedelta(days)
    first, last = (str(date) if random.random() < 0.3 else _long(date) for date in (start, end))
    text = one_of(
        random, f"How many days are there from {first} to {last}?", f"How many days lie between {first} and {last}?"
    )
    names = one_of(random, "start end", "first last", "from to").split()
    tool = _declare(
        one_of(random, "days_between", "count_days"),
        "Counts the days from a date to another, YYYY-MM-DD.",
        dict.fromkeys(names, "string"),
    )
    arguments = dict(zip(names, (str(start), str(end)), strict=True))
    return _call("calendar", text, tool, arguments, {"days": days}, f"There are {days} days.")


def _days_after(random: Random, held_out: bool) -> Call:
    date, days = _date(random, held_out, "days_after"), random.randint(2, 200)
    said, then = _said(random, date), str(date + datetime.timedelta(days))
    text = one_of(random, f"What date is {days} days after {said}?", f"Which date is {days} days after {said}?")
    names = one_of(random, "date days", "start days", "date count").split()
    tool = _declare(
        one_of(random, "add_days", "days_after"),
        "Gives the date some days after a date, YYYY-MM-DD.",
        dict(zip(names, ("string", "integer"), strict=True)),
    )
    arguments = dict(zip(names, (str(date), days), strict=True))
    return _call("calendar", text, tool, arguments, {"date": then}, f"It is {then}.")


def _date(random: Random, held_out: bool, family: str) -> datetime.date:
    while True:
        date = FIRST_DAY + datetime.timedelta(random.randrange(DAYS))
        if is_held_out(family, str(date)) == held_out:
            return date


def _said(random: Random, date: datetime.date) -> str:
    return _long(date) if random.random() < 0.6 else str(date)


def _long(date: datetime.date) -> str:
    return f"{date:%B} {date.day}, {date.year}"


# ---- cities ----


def _weather(random: Random, held_out: bool) -> Call:
    city, text = _city(
        random,
        held_out,
        "weather",
        "What is the weather in {city}?",
        "How is the weather in {city}?",
        "Do I need an umbrella in {city}?",
        "Is it cold in {city}?",
        "How warm is it in {city} now?",
    )
    name = one_of(random, "city", "location", "place")
    tool = _declare(
        one_of(random, "get_weather", "weather", "current_weather"), "Gives the weather in a city.", {name: "string"}
    )
    sky, degrees = random.choice(SKIES), random.randint(-9, 39)
    sentence = f"In {city} it is {degrees} degrees, with {sky}."
    return _call("lookup", text, tool, {name: city}, {"temperature": degrees, "sky": sky}, sentence)


def _clock(random: Random, held_out: bool) -> Call:
    city, text = _city(
        random,
        held_out,
        "clock",
        "What time is it in {city}?",
        "What is the time in {city}?",
        "How late is it in {city}?",
        "Tell me the time in {city}.",
    )
    name = one_of(random, "city", "location", "place")
    tool = _declare(
        one_of(random, "get_time", "clock", "local_time"), "Gives the time of day in a city.", {name: "string"}
    )
    time = f"{random.randrange(24):02}:{random.randrange(60):02}"
    return _call("lookup", text, tool, {name: city}, {"time": time}, f"In {city} it is {time}.")


def _city(random: Random, held_out: bool, family: str, *wordings: str) -> tuple[str, str]:
    while True:
        city, wording = random.choice(CITIES), random.randrange(len(wordings))
        if is_held_out(family, city, wording) == held_out:
            return city, wordings[wording].format(city=city)


# ---- what they share ----


def _declare(name: str, description: str, types: Mapping[str, str]) -> dict[str, Any]:
    properties = {argument: {"type": kind} for argument, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _call(
    family: str, text: str, tool: dict[str, Any], arguments: dict[str, Any], result: dict[str, Any], sentence: str
) -> Call:
    name = tool["function"]["name"]
    given = ", ".join(f"{key} {value}" for key, value in arguments.items())
    thoughts = thinking(f"The function {name} tells it, with {given}.", f"The function {name} tells it.")
    return Call(family, text, tool, arguments, result, sentence, thoughts)
