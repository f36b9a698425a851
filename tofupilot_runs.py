#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Everything of `tofupilot runs` in one file: list, read, create and delete test runs, attach
files to them, and keep them in a queue while the network is away.

TofuPilot (https://www.tofupilot.com) keeps the test runs of hardware factories. This file is a
client for its servers. There is nothing to install: copy it to any machine that has Python 3.6 or
newer, and start with

    python3 tofupilot_runs.py --help

As a module it has `Client`, `store` and the errors that they raise.

The sections of this file, each of which uses only those above it:

    identity        name, version, limits
    errors          the type of an error says what its receiver can do next
    values          text to wire format and back: times, durations, JSON
    fields          the table of all fields; flags, requests, checks and help come from it
    checks          whether a request is right, with all problems at once; client_run_ref
    login           which server, and which key for it
    transport       one exchange with a server over a kept connection; is it the API speaking?
    files           local files: reading, safe names, atomic writes; attaching them to a run
    client          the operations, and when a request may be sent again
    queue           the SQLite file that keeps runs while the network is away
    sending         one pass over a queue
    screens         results as tables, JSON, CSV and workbooks
    report          one run for people, its measurements, yields
    commands        one function for each command; each returns a Result
    queue commands  the same for `queue`, and for `create`, which may go through it
    command line    the tree of commands, its parser and its help
    main            streams, signals and the exit status

To find your way, read from `main` at the end upwards. Modules that cost much at every start (ssl,
sqlite3, urllib.request, hashlib and others) are imported where they are needed.
"""
# An f-string: Python 2 and 3.5 stop here with a SyntaxError that shows this line.
f"tofupilot_runs.py needs Python 3.6 or newer: run it with python3 (Python 2 shows this line)"

import sys

if (__name__ == "__main__" and not sys.flags.isolated
        and not getattr(sys.flags, "safe_path", False) and sys.path[0] != sys.prefix):
    # A calendar.py or signal.py of somebody else beside this file must not replace Python's own;
    # but where Python itself lives in that folder, its own modules are there.
    del sys.path[0]

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main is ready: no traceback

import _thread
import argparse
import collections
import contextlib
import datetime
import functools
import json
import math
import os
import re
import stat
import time


# ---- identity ------------------------------------------------------------------------------------

__version__ = "1.1.0"
__all__ = ["Client", "store", "Error", "BadInput", "AccessDenied", "NotFound", "Refused",
           "Unavailable"]

PROG = "tofupilot_runs.py"
CLOUD = "https://www.tofupilot.app"
ON_WINDOWS = os.name == "nt"
ANSWER_LIMIT = 64 << 20     # bytes of an answer
ERROR_LIMIT = 64 << 10      # bytes of an answer that is an error, and of a credentials file
BLOCK = 64 << 10            # bytes of a file in memory at a time
DAY = 86400                 # seconds
MAX_TOTAL_WAIT = 60         # seconds that the waits of one direct command may add up to
CONNECT_TIMEOUT = 10        # seconds for each address of a host
MAX_DELAY = 3600            # seconds between two tries, in the queue too (see SUB_UNIT_DELAY)
UPLOAD_WINDOW = 45          # seconds in which a PUT must begin: upload URLs live for 60
CLOCK_SLACK = 600           # seconds that two looks at a server's clock may differ
SLOWEST_FILE = 16 << 10     # bytes a second at which a file may still go up or come down
PAGES_AHEAD = 4             # pages of a list that are asked for at the same time
OVERLOADED = (429, 503)     # HTTP statuses of a server that wants fewer requests


# ---- errors --------------------------------------------------------------------------------------

class Error(Exception):
    """Something failed. `message` says what and why, `hint` what to do next; where no hint is given
    it is the `usual_hint` of the type.

    `status` is the HTTP status or None, `code` the server's word for the problem, `issues` the list
    of single problems ("path: reason"), `reason` what the server said, `notes` further lines of
    facts. `id` is the ID of a run that is stored all the same, `cursor` where a list that broke off
    goes on, `maybe_sent` whether the request may have arrived, `tells_doubt` whether the text says
    that already, `retry_after` the seconds that the server asks for, or None.
    """
    exit_code = 1
    usual_hint = ""
    maybe_sent = False
    tells_doubt = False
    id = None
    cursor = None
    retry_after = None

    def __init__(self, message, hint=None, status=None, code=None, issues=(), reason=""):
        super().__init__(message)
        self.message = message
        self.hint = self.usual_hint if hint is None else hint
        self.status = status
        self.code = code
        self.issues = list(issues)
        self.reason = reason
        self.notes = []

    def __str__(self):
        return "\n  ".join([self.text] + self.issues)

    @property
    def text(self):
        """The message with its notes, a line each."""
        return "\n".join([self.message] + self.notes)

    def with_note(self, note, hint=None):
        """Adds a fact, and perhaps a better hint. Returns the error, to be raised."""
        self.notes.append(note)
        if hint is not None:
            self.hint = hint
        return self

    def as_json(self):
        """The object that --json prints on stderr."""
        found = {
            "type": "error",
            "message": self.text,
            "code": self.code,
            "status": self.status,
            "issues": self.issues,
            "exit_code": self.exit_code,
            "hint": self.hint or None,
        }
        if self.id:
            found["id"] = self.id
        return found


class BadInput(Error):
    """Wrong usage or bad data; nothing was sent. Fix the call."""
    exit_code = 2


class AccessDenied(Error):
    """No key, or one that is not accepted or not allowed to (401, 403). Fix the key."""
    exit_code = 3


class NotFound(Error):
    """No such run, upload, queue entry or queue file (404). Fix the ID.

    `after_unanswered_try`: an earlier try got no answer; perhaps that one deleted it.
    """
    exit_code = 4
    after_unanswered_try = False


class Refused(Error):
    """The server refused the data (other 4xx). Fix the data."""
    exit_code = 5
    usual_hint = "correct the data; sending it again unchanged cannot work"


class Unavailable(Error):
    """Network, TLS, overload, or not the API's answer. The same call again later is safe.

    `retryable` is False where another try at once is useless; `reused`: a kept connection had died.
    """
    exit_code = 6
    usual_hint = "run the same command again later: it is safe"
    maybe_sent = True
    retryable = True
    reused = False


class NotSent(Unavailable):
    """The fault is on this machine: nothing was sent, and another try at once is useless."""
    maybe_sent = False
    retryable = False


class NotTheAPI(Unavailable):
    """What answered is not the API: a login portal, a proxy, a redirect."""
    retryable = False


class FileFailed(Unavailable):
    """A file did not arrive: the storage refused it, or it could not be read to its end here.

    `is_network`: the storage was out of reach.
    """
    maybe_sent = False
    is_network = False


class QueueUnusable(NotSent):
    """The queue file cannot be read or written. It was left as it is."""


class Damaged(Error):
    """What a queue file holds is not what was stored in it."""


class Stopped(Error):
    """Ctrl-C, SIGTERM (143), or a question answered with no."""
    exit_code = 130


class Terminated(KeyboardInterrupt):
    """SIGTERM. It is no Exception, so that no handler of errors takes it for one."""


# ---- values --------------------------------------------------------------------------------------

# Patterns are text here and compiled where they are used, not at every start.
_TIME = (r"(?a)(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d)(?::(\d\d)([.,]\d+)?)?"
         r"(?: ?([Zz]|[+-]\d\d(?::?\d\d)?))?")
_DATE = r"(?a)\d{4}-\d\d-\d\d"
_AGO = r"(?a)(\d{1,9})([smhdw])"
_ISO_DURATION = (r"(?a)P(?:(\d+)W|(?!.*W)(?=\d|T\d)(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)D)?"
                 r"(?:T(?=\d)(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:[.,]\d+)?)S)?)?)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_UTC = datetime.timezone.utc
ENCODER = json.JSONEncoder(allow_nan=False)     # json.dumps would make one for each row
READABLE_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
MAX_NESTING = 100           # brackets inside each other in a request


def require(holds, reason):
    """ValueError(reason) unless it holds; the caller adds the name of the field."""
    if not holds:
        raise ValueError(reason)


def printable(value, limit=None, keep=""):
    r"""Text from a server or a file, safe on a terminal: what is not printable is escaped.

    >>> printable("a\x1b[2Jb\n\u202ec")
    'a\\x1b[2Jb\\n\\u202ec'
    """
    text = value if isinstance(value, str) else json_text(value)
    if limit and len(text) > limit:
        text = text[:limit] + "..."
    if text.isprintable():
        return text
    shown = []
    for character in text:
        if not character.isprintable() and character not in keep:
            character = character.encode("unicode_escape").decode("ascii")
        shown.append(character)
    return "".join(shown)


def decode_text(data):
    """The text of a file: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    A closing Ctrl-Z of old editors is left out. ValueError tells where the first wrong byte is.
    """
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[:error.start].decode(encoding, "replace")
        line = before.count("\n") + 1
        column = len(before) - before.rfind("\n")
        byte = data[error.start]
        raise ValueError(f"line {line}, column {column}: byte 0x{byte:02x} is not UTF-8; "
                         "save the file as UTF-8") from None
    text = text[1:] if text[:1] == "\ufeff" else text
    return text[:-1] if text[-1:] == "\x1a" else text


def load_json(data):
    """JSON of a server, from text or bytes. ValueError for anything else, NaN included."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")
    try:
        return json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise ValueError("too many brackets inside each other") from None


def load_input_json(data):
    """JSON that somebody wrote, from text or bytes.

    ValueError for a key that stands twice in an object (the last would win unseen), and with line
    and column for what is not JSON. NaN and Infinity come back as numbers: the checks name their
    place.
    """
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            twice = json.dumps(counts.most_common(1)[0][0])
            raise ValueError(f"the key {twice} is given twice in one object")
        return found
    text = data if isinstance(data, str) else decode_text(data)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("too many brackets inside each other") from None
    except json.JSONDecodeError as error:
        lines = text.split("\n")
        line = lines[error.lineno - 1]
        there = line[max(0, error.colno - 20):error.colno + 20].strip()
        place = f"line {error.lineno}, column {error.colno}"
        advice = advice_on_json(text, error.pos)
        raise ValueError(f"{error.msg} at {place}: {printable(there)}{advice}") from None


def advice_on_json(text, place):
    """What to write where JSON breaks off, for the usual slips; else nothing."""
    rest = text[place:]
    if re.match(r"[\w\s\]]*'", rest):
        return " (JSON has double quotes)"
    if re.match("True|False|None", rest):
        return " (JSON writes true, false and null)"
    if re.search(r"\d, ?$", text[:place]) and rest[:1].isdigit():
        return " (a decimal point, not a comma)"
    return ""


def require_shallow(value):
    """ValueError where brackets are nested deeper than anything that walks them can follow."""
    level = [value]
    for _ in range(MAX_NESTING):
        children = []
        for item in level:
            inner = item.values() if isinstance(item, dict) else item
            children += [child for child in inner if isinstance(child, (dict, list, tuple))]
        if not children:
            return
        level = children
    raise ValueError(f"has more than {MAX_NESTING} brackets inside each other")


def dump_json(value, indent=None):
    """JSON as text, in ASCII so that no stream can fail on it.

    What JSON does not know (a server's 1e999 becomes infinity) is written as text.
    """
    try:
        if indent is None:
            return ENCODER.encode(value)
        return json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(storable(value), indent=indent, allow_nan=False)


def json_text(value):
    r"""JSON for people, who want to read \u00fc as it is."""
    try:
        return READABLE_ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError):
        return READABLE_ENCODER.encode(storable(value))


def to_json(value):
    """A value of the module's caller as JSON: times as text with their offset, tuples as lists."""
    if isinstance(value, datetime.datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=local_zone(value))
        return aware.isoformat()
    if isinstance(value, dict):
        found = {}
        for key, item in value.items():
            if key is None or isinstance(key, (bool, int, float)):
                key = json.dumps(key)       # as JSON writes it; keys of two kinds cannot be sorted
            found[key] = to_json(item)
        return found
    if isinstance(value, (list, tuple)):
        if value and all(type(item) is float for item in value):
            return list(value)
        return [to_json(item) for item in value]
    return value


def storable(value, depth=0):
    """The value as JSON that can always be written, whatever it is.

    >>> storable({"a": float("nan"), 2: [set()]})
    {'a': 'NaN', '2': ['set()']}
    """
    if depth > MAX_NESTING:
        return "..."
    if isinstance(value, dict):
        found = {}
        for key, item in value.items():
            found[storable_text(key)] = storable(item, depth + 1)
        return found
    if isinstance(value, (list, tuple)):
        return [storable(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 10000:
        return hex(value)       # so many decimal digits Python does not write
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return storable_text(value)


def storable_text(value):
    """A text that UTF-8 can write, whatever the value is."""
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception:       # an object of the caller's
        text = f"<{type(value).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def local_zone(naive):
    """The offset of this machine's local time at a time without offset.

    Windows knows none before 1970 and after 3000: there a year with the same dates stands in.
    """
    try:
        return datetime.timezone(naive.astimezone().utcoffset())
    except (OSError, OverflowError, ValueError):
        near = naive.replace(year=1972 if naive.year < 1972 else 2036)
        return datetime.timezone(near.astimezone().utcoffset())


def local_midnight(naive):
    """Midnight of that day in local time, as text with its offset."""
    midnight = naive.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    return midnight.replace(tzinfo=local_zone(midnight)).isoformat()


def is_relative_time(text):
    """Whether a time depends on when it is read: now, 24h, today, a bare date."""
    word = text.strip().lower()
    return word in ("now", "today", "yesterday") or bool(
        re.fullmatch(_AGO, word) or re.fullmatch(_DATE, word))


def parse_time(text, fold=0):
    """A time as the API takes it: ISO 8601 with an offset, every digit of its fraction kept.

    Without an offset it is this machine's local time; `fold=1` takes the second reading in the
    hour that autumn has twice. ValueError for anything else, moving times included.

    >>> parse_time("2026-05-19 08:00:00.250+0200")
    '2026-05-19T08:00:00.250+02:00'
    """
    text = text.strip()
    match = re.fullmatch(_TIME, text)
    if not match:
        require(not re.fullmatch(_DATE, text),
                f"give the time of day too, such as {text}T08:00:00Z")
        require(not is_relative_time(text),
                f"{text} would make each repetition another run: give the whole time")
        raise not_a_time(text, "use 2026-05-19T08:00:00+02:00, or Z for UTC")
    *parts, fraction, offset = match.groups("")
    numbers = [int(part or 0) for part in parts]
    try:
        naive = datetime.datetime(*numbers, fold=fold)
    except ValueError as error:
        raise not_a_time(text, error) from None
    if not offset:
        offset = naive.replace(tzinfo=local_zone(naive)).isoformat()[19:25]
    elif offset in "Zz":
        offset = "Z"
    else:
        hours = offset[:3]
        minutes = offset[3:].lstrip(":") or "00"
        offset = f"{hours}:{minutes}"
        require(hours[1:] <= "23" and minutes <= "59", f"{offset} is not an offset")
    found = naive.isoformat() + fraction.replace(",", ".") + offset
    try:
        utc_parts(found)
    except OverflowError:
        raise ValueError(f"{text} is outside of the years 1 to 9999 in UTC") from None
    return found


def not_a_time(text, reason):
    """The ValueError for what is no time; a date such as 25.11.2026 is told as it has to be."""
    match = re.match(r"(?a)(\d\d?)\.(\d\d?)\.(\d{4})(?: +(\d\d:\d\d(?::\d\d)?))?", text)
    if match:
        day, month, year, hours = match.groups("08:00:00")
        reason = f"use {year}-{month:0>2}-{day:0>2}T{hours}"
    return ValueError(f"{text[:60]!r} is not a time: {reason}")


def parse_when(text, now):
    """A time to compare with, as text with its offset: as parse_time, or relative to `now`.

    `now` is an aware datetime. `now`, `today`, `yesterday`, a bare date (local midnight), and
    `90s 30m 24h 7d 2w` (that long ago) are known too.

    >>> parse_when("90m", datetime.datetime(2026, 5, 19, 8, tzinfo=_UTC))
    '2026-05-19T06:30:00.000+00:00'
    """
    word = text.strip().lower()
    if word == "now":
        return now.isoformat(timespec="milliseconds")
    if word == "today":
        return local_midnight(now)
    if word == "yesterday":
        return local_midnight(now - datetime.timedelta(days=1))
    if re.fullmatch(_DATE, word):
        try:
            day = datetime.datetime(*map(int, word.split("-")))
        except ValueError as error:
            raise not_a_time(text, error) from None
        return local_midnight(day)
    past = re.fullmatch(_AGO, word)
    if past:
        length = int(past.group(1)) * _SECONDS[past.group(2)]
        try:
            return (now - datetime.timedelta(seconds=length)).isoformat(timespec="milliseconds")
        except OverflowError:
            raise ValueError(f"{text} ago is before the year 1") from None
    require(not re.fullmatch(_AGO, word[1:]) or word[0] != "-",
            f"{word[1:]} means that long ago already: leave the minus out")
    if re.fullmatch(_TIME, text.strip()):
        return parse_time(text)
    raise not_a_time(text, "use 2026-05-19T08:00:00Z, a date, today, yesterday, "
                     "24h or 7d (ago), or now")


@functools.lru_cache(maxsize=64)    # the checks, their order and the ref ask for the same times
def utc_parts(text):
    """(whole second in UTC, further digits) of a time with offset."""
    match = re.fullmatch(_TIME, text)
    *parts, fraction, offset = match.groups()
    numbers = []
    for part in parts:
        numbers.append(int(part or 0))
    local = datetime.datetime(*numbers, tzinfo=_UTC)
    utc = local - offset_length(offset)
    digits = fraction or ""
    return utc, digits[1:].rstrip("0")


def offset_length(text):
    """+02:00, +0200, +02, Z or None as a timedelta."""
    if not text or text in "Zz":
        return datetime.timedelta(0)
    sign = text[0]
    minutes = text[3:].lstrip(":")
    length = datetime.timedelta(
        hours=int(text[1:3]),
        minutes=int(minutes or 0))
    if sign == "-":
        return -length
    return length


def utc_text(text):
    """A time with offset in UTC: one spelling for one instant.

    >>> utc_text("2026-05-19T08:00:00.2500+02:00")
    '2026-05-19T06:00:00.25Z'
    """
    when, digits = utc_parts(text)
    fraction = "." + digits if digits else ""
    return when.isoformat()[:19] + fraction + "Z"


def epoch(text):
    """Seconds since 1970 of a time with offset, or None for anything else."""
    try:
        when, digits = utc_parts(text)
        return when.timestamp() + float("0." + digits)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None


def utc_from_epoch(seconds):
    """2026-05-19T06:00:00Z, or None for what is no time."""
    if not is_number(seconds) or not abs(seconds) < 2e11:
        return None
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    return moment.isoformat()[:19] + "Z"


def shift_time(when, seconds):
    """A datetime moved by so many seconds; the first or last there is where that is beyond it."""
    try:
        return when + datetime.timedelta(seconds=seconds)
    except OverflowError:
        edge = datetime.datetime.min if seconds < 0 else datetime.datetime.max
        return edge.replace(tzinfo=when.tzinfo)


def unknown_time_zone():
    """The name in TZ if this machine has no data for it and takes UTC instead, else None."""
    name = os.environ.get("TZ", "").lstrip(":")
    if not re.fullmatch(r"[A-Za-z_]+(/[A-Za-z_+-]+)*", name):
        return None
    first = name.partition("/")[0]
    if first.upper() in ("UTC", "GMT", "UCT", "ETC", "ZULU", "GREENWICH", "UNIVERSAL"):
        return None
    if ON_WINDOWS:      # it knows no zone by its name, and takes the letters of this one for UTC
        return name
    if time.timezone or time.daylight:
        return None
    return name if time.tzname[0] in (first, name, "UTC", "") else None


def parse_duration(text):
    """A length of time as ISO 8601, from ISO 8601 or from 90s, 1h30m, 2d.

    >>> parse_duration("1h30m"), parse_duration("PT1M30S")
    ('PT5400S', 'PT1M30S')
    """
    text = text.strip()
    if re.fullmatch(_ISO_DURATION, text.upper()):
        return text.upper()
    require(re.fullmatch(r"(?:\d{1,9}(?:\.\d+)?[smhdw])+", text, re.A),
            "not a duration: use 90s, 1h30m or PT1M30S")
    total = 0
    for part in re.findall(r"[\d.]+.", text):
        number, unit = part[:-1], part[-1]
        total += float(number) * _SECONDS[unit]
    seconds = f"{total:.3f}".rstrip("0").rstrip(".")
    return f"PT{seconds}S"


def duration_seconds(iso):
    """Seconds of an ISO 8601 duration, or None where it has years, months or another form.

    >>> duration_seconds("PT1M35.5S"), duration_seconds("P1Y")
    (95.5, None)
    """
    if not isinstance(iso, str) or len(iso) > 40:
        return None
    match = re.fullmatch(_ISO_DURATION, iso)
    if not match:
        return None
    weeks, years, months, days, hours, minutes, seconds = match.groups("0")
    if match.group(2) or match.group(3):    # years and months have no certain length
        return None
    total = float(seconds.replace(",", "."))
    total += 60 * int(minutes) + 3600 * int(hours)
    total += 86400 * int(days) + 604800 * int(weeks)
    return total


def duration_text(iso):
    """What people write for an ISO 8601 duration; what cannot be read comes back as it is.

    >>> duration_text("PT1M35S"), duration_text("PT0.25S"), duration_text("P1DT2H")
    ('1m 35s', '0.25s', '1d 2h')
    """
    if iso is None:
        return ""
    seconds = duration_seconds(iso)
    return printable(iso) if seconds is None else seconds_text(seconds)


def seconds_text(total):
    """1m 35s, 4.2s, 3h 5m: two units at most."""
    if total < 59.95:
        return f"{total:.3g}s"
    total = round(total)
    minutes, seconds = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    numbers = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    while numbers[0][0] == 0:
        numbers.pop(0)
    return " ".join(f"{number}{unit}" for number, unit in numbers[:2] if number)


def counted(count, word):
    """1 run, 2 runs."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def size_text(size):
    """184 KB, 1.8 MB.

    >>> size_text(999), size_text(1840000)
    ('999 B', '1.8 MB')
    """
    if not is_number(size) or not 0 <= size < 1e300:
        return "size unknown"
    for unit in ("B", "KB", "MB"):
        if size < 999.5:
            digits = 0 if unit == "B" or size >= 10 else 1
            return f"{size:.{digits}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def is_number(value):
    """Whether it is a number of JSON: True is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sha256_of(blocks):
    """The SHA-256 of some blocks of bytes, in hexadecimal."""
    import hashlib
    found = hashlib.sha256()
    for block in blocks:
        found.update(block)
    return found.hexdigest()


def sha256_of_text(text):
    """The SHA-256 of an ASCII text, in hexadecimal.

    hashlib loads OpenSSL, which takes 3 ms. For a short text Python's own implementation will do,
    which random.py takes for the same reason. Some systems leave it out.
    """
    data = text.encode("ascii")
    name = "_sha2" if sys.version_info >= (3, 12) else "_sha256"
    if len(data) <= BLOCK:
        with contextlib.suppress(ImportError):
            return __import__(name).sha256(data).hexdigest()
    return sha256_of([data])


def parse_word(text):
    """The value of `--set key=value`: what JSON writes just so (12, true, null, "1"), else text.

    >>> [parse_word(word) for word in ("12", "1.10", "true", "null", "A", "007", '"1.1"')]
    [12, '1.10', True, None, 'A', '007', '1.1']
    """
    try:
        value = load_json(text)
    except ValueError:
        return text
    if isinstance(value, str):
        return value
    if is_number(value) and len(text) > 15:     # a number would lose digits
        return text
    written_so = text[0] not in "[{" and json.dumps(value) == text
    return value if written_so else text


# What differs between problems of one kind: an index, a wrong value, a time, what to write.
_VARYING = r"\[\d+\]|(?<=: )'[^']*'(?= is not )|\d{4}-\d\d-\d\dT[\d:.Z+-]+|: write .*"


def group_issues(issues):
    """Problems that differ in list indices or in values alone, told once with a count.

    >>> group_issues(["a[0].b: missing", "a[1].b: missing", "c: is empty"])
    ['a[0].b: missing (and 1 more like it)', 'c: is empty']
    """
    first, counts = {}, collections.Counter()
    for issue in issues:
        kind = re.sub(_VARYING, "[]", issue)
        first.setdefault(kind, issue)
        counts[kind] += 1
    lines = []
    for kind, issue in first.items():
        more = counts[kind] - 1
        lines.append(f"{issue} (and {more} more like it)" if more else issue)
    return lines


def get_path(value, path):
    """What stands at a dotted path of nested dicts, or None."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def only_dicts(value):
    """The dicts of a list; an odd value has none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def first_line(text):
    """A text of several lines as one."""
    return text.partition("\n")[0]


def local_path(text):
    """A path of the command line as the system's functions want it: see main about Python 3.6."""
    if sys.version_info >= (3, 7):
        return text
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def names_a_file(word):
    """Whether a word is the path of something that exists."""
    try:
        return os.path.exists(local_path(word))
    except ValueError:      # before Python 3.8: too long for a path, or with a NUL
        return False


# ---- fields --------------------------------------------------------------------------------------
#
# One Field for each field of a request. It makes the flag, its help, the keyword argument of the
# module, the check, and the place in the request. Adding a filter that a new server offers is one
# line in LIST.
#
# A kind is a function of KINDS, which takes a value and its Field, and returns the value as it goes
# over the wire; ValueError says what is wrong with it. Kinds that look alike: `time` is a whole
# time and `when` also 24h or now; `id` is the server's, `serial` a text to look for, `identifier` a
# name that the server makes an object of; `object` is any JSON object, `metadata` one of up to 50
# keys.

_IDENTIFIER = r"[a-zA-Z0-9_.:+-]+"
IDENTIFIER_CHARACTERS = "A-Z a-z 0-9 and _ . : + -"


def check_text(value, field):
    if is_number(value):
        raise ValueError(f'must be text: write "{value}"')
    require(isinstance(value, str), "must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("is not text that UTF-8 can write") from None
    return value


def check_id(value, field):
    check_text(value, field)
    require(value.strip(), "is empty")
    require(value.strip() not in (".", ".."), f"{value!r} is not an ID")
    return value


def check_serial(value, field):
    return check_id(value, field).strip()


def check_identifier(value, field):
    value = check_text(value, field).strip()
    require(value, "is empty")
    require(len(value) <= 60, f"has {len(value)} characters, the server takes 60")
    wrong = sorted(set(re.sub(_IDENTIFIER, "", value)))
    shown = " ".join(map(repr, wrong))
    require(not wrong, f"the server takes {IDENTIFIER_CHARACTERS} only, not {shown}"
            + advice_on(wrong, field.many))
    return value


def advice_on(wrong, many=False):
    """What to write in place of characters that a name cannot have."""
    if many and "," in wrong:
        return ": separate several with spaces"
    if any(character.isalpha() for character in wrong):
        return ": write ue for \u00fc, for example"
    return ": write _ in their place"


def check_name(value, field):
    check_text(value, field)
    require(value, "is empty")
    require(len(value) <= 255, f"has {len(value)} characters, the server takes 255")
    return value


def check_enum(value, field):
    require(isinstance(value, str), "must be text, one of " + " ".join(field.choices))
    word = check_text(value, field).strip()
    if word in field.choices:
        return word
    choices = {choice.lower(): choice for choice in field.choices}
    choice = choices.get(word.lower())
    if choice is None:
        require(word, "is empty; use one of " + " ".join(field.choices))
        meant = closest(word.lower(), list(choices))
        known = " ".join(field.choices)
        reason = f"{word[:60]!r} is not one of {known}"
        if meant:
            reason += f"; did you mean {choices[meant]}?"
        raise ValueError(reason)
    return choice


def check_time(value, field):
    return parse_time(text_of_time(value))


def check_when(value, field):
    return parse_when(text_of_time(value), datetime.datetime.now().astimezone())


def text_of_time(value):
    """A time that is text, or a datetime, as text."""
    if isinstance(value, datetime.datetime):
        value = to_json(value)
    require(isinstance(value, str), "must be text, such as 2026-05-19T08:00:00Z")
    return value


def check_duration(value, field):
    return parse_duration(check_text(value, field))


def check_integer(value, field):
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,15}", value.strip()):
        value = int(value)
    require(isinstance(value, int) and not isinstance(value, bool), "must be a whole number")
    return value


def check_count(value, field):
    value = check_integer(value, field)
    require(value >= 0, "must be 0 or more")
    return value


def check_limit(value, field):
    value = check_integer(value, field)
    require(value >= 1, "must be 1 or more")
    return value


def check_page(value, field):
    value = check_integer(value, field)
    require(1 <= value <= 100, "must be 1 to 100")
    return value


def check_seconds(value, field):
    require(re.fullmatch(r"\d{1,6}(\.\d+)?", value) and float(value),
            "must be a number, above 0 and below 1000000")
    return float(value)


def check_boolean(value, field):
    word = str(value).lower()
    require(word in ("true", "false"), "must be true or false")
    return word == "true"


def check_number(value, field):
    require(type(value) in (int, float), "must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{json.dumps(value)} is not valid JSON")
    return value


def check_scalar(value, field):
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(value, field)
    require(is_number(value), "must be text, a number, true or false")
    return check_number(value, field)


def check_units(value, field):
    if isinstance(value, list):
        return [check_text(unit, field) for unit in value]
    return check_text(value, field)


def check_any(value, field):
    if isinstance(value, (str, bool, int, float)):
        return check_scalar(value, field)
    if isinstance(value, (dict, list, tuple)):
        require_shallow(value)
    value = to_json(value)
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeError:
        raise ValueError("holds text that UTF-8 cannot write") from None
    except ValueError:
        raise ValueError("holds NaN or Infinity, which is not valid JSON") from None
    except (TypeError, RecursionError):
        raise ValueError("holds an object that JSON does not know") from None
    return value


def check_object(value, field):
    require(isinstance(value, dict), "must be a JSON object, such as " + field.example.strip("'"))
    return check_any(value, field)


def check_metadata(value, field):
    require(isinstance(value, dict), "must be a JSON object, such as " + field.example.strip("'"))
    return value


def check_path(value, field):
    require(value, "is empty")
    return local_path(value)


def check_flag(value, field):
    return value


KINDS = {
    "text": check_text, "id": check_id, "serial": check_serial, "identifier": check_identifier,
    "name": check_name, "enum": check_enum, "time": check_time, "when": check_when,
    "duration": check_duration, "integer": check_integer, "count": check_count,
    "limit": check_limit, "page": check_page, "seconds": check_seconds, "boolean": check_boolean,
    "number": check_number, "scalar": check_scalar, "units": check_units, "any": check_any,
    "object": check_object, "metadata": check_metadata, "record": check_object, "path": check_path,
    "flag": check_flag,
}
JSON_KINDS = ("record", "object", "metadata")
PLAIN_KINDS = tuple(kind for kind in KINDS if kind not in ("record", "metadata", "time"))


class Record:
    """The fields of one JSON object."""

    def __init__(self, *fields):
        self.fields = fields
        self.by_name = {field.name: field for field in fields}
        self.names = tuple(self.by_name)
        self.required = tuple(field.name for field in fields if field.required)
        self.has_times = False      # whether there is a time in it, at any depth
        for field in fields:
            if field.kind == "time" or field.record and field.record.has_times:
                self.has_times = True


class Field:
    """A field of a request, or a flag of a command.

    `many`: a list; `null`: the API takes null; `record`: the fields of each JSON object in it.
    `help` and `example` stand in the help of the command.
    """

    def __init__(self, name, kind, help="", example="", choices=(), many=False, required=False,
                 null=False, record=None):
        self.name = name
        self.kind = kind
        self.check = KINDS[kind]
        self.help = help
        self.example = example
        self.choices = tuple(choices)
        self.many = many
        self.required = required
        self.null = null
        self.record = record
        self.is_plain = kind in PLAIN_KINDS and not many    # its value can be checked by itself
        self.group = ""
        if (kind == "enum") != bool(choices) or (kind == "record") != bool(record):
            raise TypeError(f"{name}: an enum has choices, a record its fields, others have none")


def group(title, *fields):
    """Fields that stand below one title in the help."""
    for field in fields:
        field.group = title
    return fields


RUN_OUTCOMES = ("PASS", "FAIL", "ERROR", "TIMEOUT", "ABORTED")
STEP_OUTCOMES = ("PASS", "FAIL", "UNSET")
OPERATORS = (">=", "<=", ">", "<", "==", "!=", "in", "not in", "matches", "range")
LOWER = (">=", ">")
UPPER = ("<=", "<")
BOUNDS = LOWER + UPPER
COMPARISONS = BOUNDS + ("==", "!=", "range")
SOURCES = ("default", "shell", "dotenv", "process", "station", "procedure", "organization")

LIST = Record(
    *group(
        "which runs",
        Field("search_query", "text", "part of a serial number, or the beginning of a run ID",
              "PCB01"),
        Field("ids", "id", "run IDs, or @FILE or - with one a line", "run_abc run_def", many=True),
        Field("outcomes", "enum", "results", "FAIL ERROR", RUN_OUTCOMES, many=True),
        Field("procedure_ids", "id", "procedure IDs", "proc_abc", many=True),
        Field("procedure_versions", "text", "version tags of procedures", "1.2.3", many=True),
        Field("deployment_ids", "id", "deployments that the runs came from", "dep_abc", many=True),
        Field("environments", "enum", "environments of those deployments", "production",
              ("production", "preview", "development"), many=True),
        Field("execution_ids", "text", "executions of several slots", "exec-7f3a", many=True),
        Field("slot_keys", "text", "keys of fixture slots", "slot-1", many=True),
        Field("slot_names", "text", "names of fixture slots", "'Left nest'", many=True),
    ),
    *group(
        "unit",
        Field("serial_numbers", "serial", "serial numbers, or @FILE or - with one a line",
              "SN-0001 SN-0002", many=True),
        Field("samples", "enum", "kinds of unit", "golden",
              ("production", "golden", "failing", "ignored"), many=True),
        Field("part_numbers", "text", "part numbers", "PCB01", many=True),
        Field("revision_numbers", "text", "revisions", "B", many=True),
        Field("batch_numbers", "text", "batches", "2026-W20", many=True),
    ),
    *group(
        "when",
        Field("duration_min", "duration", "at least this long: 90s, 1h30m or PT1M30S", "90s"),
        Field("duration_max", "duration", "at most this long", "5m"),
        Field("started_after", "when", "started at or after: ISO 8601, 24h (ago), now; a date, "
              "today and yesterday are their 00:00", "yesterday"),
        Field("started_before", "when", "started at or before: a date leaves that day out",
              "today"),
        Field("ended_after", "when", "ended at or after", "2026-05-19T08:00:00+02:00"),
        Field("ended_before", "when", "ended at or before", "2026-05-19T16:00"),
        Field("created_after", "when", "stored on the server at or after", "7d"),
        Field("created_before", "when", "stored on the server at or before", "now"),
    ),
    *group(
        "who",
        Field("created_by_user_ids", "id", "users who uploaded", "user_abc", many=True),
        Field("created_by_station_ids", "id", "stations that uploaded", "station_abc", many=True),
        Field("operated_by_ids", "id", "operators with an account", "user_abc", many=True),
        Field("operated_by_names", "text", "names of operators", "'Night shift'", many=True),
    ),
    *group(
        "metadata",
        Field("metadata", "object", "JSON: for each key in or contains (text), gte lte gt lt eq "
              "(number), eq (true, false)", """'{"shift":{"in":["A"]}}'"""),
        Field("include_metadata", "boolean", "metadata in each row", "--include-metadata"),
        Field("include_sequences", "boolean", "sequences in each row", "--include-sequences"),
    ),
    *group(
        "page and order",
        Field("limit", "limit", "rows wanted (50 if not given)", "200"),
        Field("cursor", "count", "number of rows to leave out first", "100"),
        Field("sort_by", "enum", "order by (started_at if not given)", "duration",
              ("started_at", "created_at", "duration", "outcome", "serial_number", "part_number",
               "revision_number")),
        Field("sort_order", "enum", "direction (desc if not given)", "asc", ("asc", "desc")),
    ),
)

VALIDATOR = Record(
    Field("outcome", "enum", choices=STEP_OUTCOMES, null=True),
    Field("operator", "text", null=True),
    Field("expected_value", "any", null=True),
    Field("expression", "text", null=True),
    Field("is_decisive", "boolean", null=True),
)
AGGREGATION = Record(
    Field("type", "text", required=True),
    Field("outcome", "enum", choices=STEP_OUTCOMES, null=True),
    Field("value", "scalar", null=True),
    Field("unit", "text", null=True),
    Field("validators", "record", record=VALIDATOR, many=True, null=True),
)
AXIS = Record(
    Field("data", "number", many=True, required=True),
    Field("units", "text", null=True),
    Field("name", "text", null=True),
    Field("description", "text", null=True),
    Field("validators", "record", record=VALIDATOR, many=True, null=True),
    Field("aggregations", "record", record=AGGREGATION, many=True, null=True),
)
MEASUREMENT = Record(
    Field("name", "text", required=True),
    Field("outcome", "enum", choices=STEP_OUTCOMES, required=True),
    Field("measured_value", "any", null=True),
    Field("units", "units", null=True),
    Field("x_axis", "record", record=AXIS, null=True),
    Field("y_axis", "record", record=AXIS, many=True, null=True),
    Field("lower_limit", "number"),
    Field("upper_limit", "number"),
    Field("validators", "record", record=VALIDATOR, many=True, null=True),
    Field("aggregations", "record", record=AGGREGATION, many=True, null=True),
    Field("docstring", "text", null=True),
)
PHASE = Record(
    Field("name", "text", required=True),
    Field("outcome", "enum", choices=("PASS", "FAIL", "SKIP", "ERROR"), required=True),
    Field("started_at", "time", required=True),
    Field("ended_at", "time", required=True),
    Field("docstring", "text", null=True),
    Field("measurements", "record", record=MEASUREMENT, many=True, null=True),
    Field("retry_count", "count"),
    Field("sequence_path", "text", null=True),
)
SEQUENCE = Record(
    Field("path", "text", required=True),
    Field("name", "text", required=True),
    Field("outcome", "enum", choices=RUN_OUTCOMES + ("SKIP",), required=True),
    Field("source", "text", null=True),
    Field("started_at", "time", null=True),
    Field("ended_at", "time", null=True),
)
LOG = Record(
    Field("level", "enum", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
          required=True),
    Field("timestamp", "time", required=True),
    Field("message", "text", required=True),
    Field("source_file", "text", required=True),
    Field("line_number", "integer", required=True),
)
SECRET = Record(
    Field("key", "text", required=True),
    Field("variable_id", "text", null=True),
    Field("version", "integer", null=True),
    Field("source", "enum", choices=SOURCES, null=True),
)
CONFIG = Record(Field("value", "scalar", required=True), *SECRET.fields)

CREATE = Record(
    *group(
        "which run",
        Field("outcome", "enum", "result", "PASS", RUN_OUTCOMES, required=True),
        Field("procedure_id", "id", "the procedure", "proc_abc", required=True),
        Field("procedure_version", "identifier", "its version tag, made when missing", "1.2.3",
              null=True),
        Field("deployment_id", "id", "the deployment it ran from", "dep_abc", null=True),
        Field("execution_id", "text", "joins the runs of several slots", "exec-7f3a", null=True),
        Field("slot_key", "text", "fixture slot, needs --execution-id", "slot-1", null=True),
        Field("slot_name", "text", "its name, needs --slot-key", "'Left nest'", null=True),
        Field("client_run_ref", "text", "your own reference instead of the one made from the "
              "content; the same reference is the same run", "station7-000042"),
    ),
    *group(
        "unit",
        Field("serial_number", "identifier", "the unit under test, made when missing", "SN-0001",
              required=True),
        Field("part_number", "identifier", "its part, where the serial number does not tell",
              "PCB01"),
        Field("revision_number", "identifier", "its revision", "B"),
        Field("batch_number", "identifier", "its batch", "2026-W20"),
        Field("sub_units", "identifier", "serial numbers of the units inside; each needs a run of "
              "its own first; \"\" for none", "PSU-1 FAN-2", many=True),
    ),
    *group(
        "when",
        Field("started_at", "time", "begin: ISO 8601; local without an offset",
              "2026-05-19T08:00:00Z", required=True),
        Field("ended_at", "time", "end, not before the begin", "2026-05-19T08:00:42Z",
              required=True),
    ),
    *group(
        "who",
        Field("operated_by", "text", "operator: an e-mail address or a name", "ada@example.com"),
    ),
    *group(
        "content",
        Field("docstring", "text", "a note", "'second try'"),
        Field("phases", "record", "JSON list of phases with their measurements; create --example "
              "shows all that can stand there",
              """'[{"name": "power", "outcome": "PASS",
      "started_at": "2026-05-19T08:00:00Z", "ended_at": "2026-05-19T08:00:12Z",
      "measurements": [{"name": "vcc", "outcome": "PASS",
                        "measured_value": 3.3, "units": "V"}]}]'""",
              record=PHASE, many=True),
        Field("sequences", "record", "JSON list of sequence calls",
              """'[{"path": "cal", "name": "Calibration", "outcome": "PASS"}]'""",
              record=SEQUENCE, many=True, null=True),
        Field("logs", "record", "JSON list of log lines",
              """'[{"level": "INFO", "timestamp": "2026-05-19T08:00:01Z",
      "message": "power on", "source_file": "fct.py", "line_number": 1}]'""",
              record=LOG, many=True),
        Field("config", "record", "JSON list of configuration values used",
              """'[{"key": "volts", "value": 3.3}]'""", record=CONFIG, many=True),
        Field("secrets", "record", "JSON list of secrets used, never their values",
              """'[{"key": "token"}]'""", record=SECRET, many=True),
    ),
    *group(
        "metadata",
        Field("metadata", "metadata", "JSON object, up to 50 keys", """'{"shift":"A","t":23.4}'"""),
        Field("unit_metadata", "metadata", "the same, for the unit", """'{"lot":"L7"}'"""),
    ),
)

RUN_ID = Record(*group("which run", Field(
    "id", "id", "the run's ID (or the ID as a plain word)", "run_abc123", required=True)))
UPLOAD_ID = Record(*group("which upload", Field(
    "id", "id", "the upload's ID", "att_1", required=True)))
FILE_NAME = Record(*group("file", Field(
    "name", "name", "file name with its extension, up to 255 characters", "report.pdf",
    required=True)))
RUN_IDS = Record(*group("which runs", Field(
    "ids", "id", "run IDs, as plain words too, or @FILE or - with one a line", "run_a run_b",
    many=True, required=True)))
UPLOADS = group("files", Field(
    "attachments", "id", "IDs of uploads to link", "att_1 att_2", many=True))
NEW_METADATA = group("metadata", Field(
    "metadata", "metadata", "JSON object; null deletes a key", """'{"shift":"A","lot":null}'"""))


# The flags of commands that are no part of a request.

FORMATS = ("table", "json", "jsonl", "csv", "xlsx")
GLOBAL = Record(
    *group(
        "output",
        Field("json", "flag", "the server's JSON on stdout, and errors as JSON on stderr"),
        Field("format", "enum", "form of the output; xlsx is a workbook. --out NAME.xlsx says "
              "it too, so do .csv .json .jsonl", "csv", FORMATS),
        Field("columns", "text", "fields to show, as dotted paths with commas and no spaces",
              "id,unit.serial_number"),
        Field("out", "path", "write to a file, which is replaced at the end only", "runs.csv"),
        Field("q", "flag", "IDs only, whatever the format; errors are still told"),
        Field("v", "flag", "a line for each request on stderr"),
        Field("dry_run", "flag", "print the requests, send nothing"),
    ),
    *group(
        "connection",
        Field("url", "text", "the server; else TOFUPILOT_URL, else the credentials file, else the "
              "cloud", "https://tofupilot.example.com"),
        Field("api_key_file", "path", "file with the key, or -; else TOFUPILOT_API_KEY, else "
              "~/.tofupilot/credentials.json", "/etc/tofupilot.key"),
        Field("ca_cert", "path", "a private CA, besides the system's; else TOFUPILOT_CA_CERT",
              "factory.pem"),
        Field("timeout", "seconds", "seconds for each wait on the network (30)", "10"),
        Field("retries", "count", "tries after the first (3)", "0"),
        Field("allow_http", "flag", "plain http to another machine"),
    ),
)
QUEUE = group("queue", Field(
    "queue", "path", "the queue file; else TOFUPILOT_QUEUE, else runs.queue in ~/.tofupilot",
    "line3.queue"))
SET = group("metadata", Field(
    "set", "text", "a key without JSON quoting; a number only as JSON writes it (1.5, not 1.50) "
    "and of 15 characters at most, else text", "shift=A temp=23.4", many=True))
UNSET = group("metadata", Field("unset", "text", "delete these keys", "lot", many=True))
YES = group("output", Field("yes", "flag", "do not ask"))
REQUEST = CREATE.fields + SET + group(
    "content",
    Field("body", "text", "the whole request as JSON; flags override its fields", "@run.json"),
    Field("attach", "path", "files to upload and link", "report.pdf scope.png", many=True),
)


def optional(fields):
    """The same fields, none of which must be given."""
    copies = []
    for field in fields:
        same = Field.__new__(Field)     # the copy module would be loaded at each start for this
        vars(same).update(vars(field), required=False)
        copies.append(same)
    return tuple(copies)


class Operation:
    """An operation of the API. `answer_keys`: texts that its answer must hold to be the API's."""

    def __init__(self, method, path, record, answer_keys=()):
        self.method = method
        self.path = path
        self.record = record
        self.fields = record.fields
        self.answer_keys = answer_keys


OPERATIONS = {
    "list": Operation("GET", "/v2/runs", LIST),
    "get": Operation("GET", "/v2/runs/{id}", RUN_ID, ("id",)),
    "create": Operation("POST", "/v2/runs", CREATE, ("id",)),
    "update": Operation("PATCH", "/v2/runs/{id}", Record(*RUN_ID.fields, *UPLOADS), ("id",)),
    "update_metadata": Operation("PATCH", "/v2/runs/{id}/metadata",
                                 Record(*RUN_ID.fields, *NEW_METADATA), ("id",)),
    "create_attachment": Operation("POST", "/v2/runs/{id}/attachments",
                                   Record(*RUN_ID.fields, *FILE_NAME.fields), ("id", "upload_url")),
    "delete": Operation("DELETE", "/v2/runs", RUN_IDS),
    "initialize": Operation("POST", "/v2/attachments", FILE_NAME, ("id", "upload_url")),
    "finalize": Operation("POST", "/v2/attachments/{id}/finalize", UPLOAD_ID, ("url",)),
    "whoami": Operation("GET", "/v2/whoami", Record(), ("type",)),
}
REQUIRED = CREATE.required      # the five fields without which there is no run


def flag_name(name):
    """--serial-number for serial_number, -v for v."""
    return ("--" if len(name) > 1 else "-") + name.replace("_", "-")


# What people type for a word of this program; difflib finds most others.
USUAL_WORDS = {
    "delete": "rm", "remove": "rm", "del": "rm", "list": "ls", "show": "get", "view": "get",
    "add": "create", "new": "create", "upload": "create-attachment", "attach": "create-attachment",
    "status": "check", "whoami": "check", "edit": "update-metadata", "logs": "get", "log": "get",
    "--sn": "--serial-number", "--serial": "--serial-number", "--part": "--part-number",
    "--batch": "--batch-number", "--since": "--started-after", "--after": "--started-after",
    "--before": "--started-before", "--until": "--started-before",
    "--station": "--created-by-station-id", "--user": "--created-by-user-id",
    "--operator": "--operated-by", "--key": "--api-key-file", "--api-key": "--api-key-file",
    "--token": "--api-key-file", "--file": "--attach", "--attachment": "--attach",
    "--host": "--url", "--server": "--url", "--base-url": "--url", "--status": "--outcome",
    "--result": "--outcome", "--procedure": "--procedure-id", "--query": "--search-query",
    "--search": "--search-query", "--output": "--out", "-o": "--out", "-L": "--limit",
    "-n": "--limit", "-f": "--format", "-j": "--json", "-h": "--help", "--quiet": "-q",
    "--verbose": "-v", "--sort": "--sort-by", "--order": "--sort-order", "--phase": "--phases",
    "--failed": "--outcome", "--fail": "--outcome", "--failures": "--outcome", "excel": "xlsx",
    "ok": "pass", "good": "pass", "nok": "fail", "bad": "fail", "ng": "fail",
}


def closest(word, known):
    """The known word that was meant, or None.

    For messages alone, so a likely guess will do; nearly_known in checks must be exact.
    """
    import difflib
    usual = USUAL_WORDS.get(word, "")
    for guess in (usual, usual + "s", usual + "-ids", usual + "-names"):
        if guess in known:
            return guess
    guesses = difflib.get_close_matches(word, known, 1) if len(word) > 2 else []
    return guesses[0] if guesses else None


# ---- checks --------------------------------------------------------------------------------------

# Names that people give to a field of the API; other slips are found by their letters.
USUAL_SLIPS = {"value": ("measured_value", "expected_value"), "limit": ("expected_value",),
               "start_time": ("started_at",), "end_time": ("ended_at",),
               "status": ("outcome",), "serial": ("serial_number",)}
USUAL_SLIPS.update(dict.fromkeys(
    "min minimum low lower lsl low_limit limit_low".split(), ("lower_limit",)))
USUAL_SLIPS.update(dict.fromkeys(
    "max maximum high upper usl high_limit limit_high".split(), ("upper_limit",)))


# Fields that get returns and create does not know: sending one back is no slip.
RETURNED = {
    CREATE: ("id", "created_at", "duration", "procedure", "unit", "created_by_user",
             "created_by_station", "attachments"),
    PHASE: ("id", "duration"),
    MEASUREMENT: ("id", "data_series"),
    AGGREGATION: ("id",),
    VALIDATOR: ("is_expression_only", "analytics_expression", "has_custom_expression"),
    SEQUENCE: ("id", "key", "parent_path", "duration"),
    LOG: ("id",),
}


class Findings:
    """What the checks of one request found: problems, and warnings about what is sent all the same.

    Both are lists of "path: reason", such as "phases[1].measurements[0].outcome: missing".
    """

    def __init__(self, keeps_unknown=True):
        self.keeps_unknown = keeps_unknown      # else an unknown field is a problem
        self.problems = []
        self.warnings = []

    def unknown_field(self, record, name, path):
        """A field outside of the table: a slip is a problem, any other a newer server may know."""
        meant = None
        if name not in RETURNED.get(record, ()):
            meant = nearly_known(name, record.names)
        if not isinstance(name, str):
            self.problems.append(f"{path}: a key must be text")
        elif meant:
            self.problems.append(f"{path}: unknown field, did you mean {meant}?")
        elif self.keeps_unknown:
            self.warnings.append(f"{path}: unknown field, sent as it is")
        else:
            self.problems.append(f"{path}: unknown field")


@functools.lru_cache(maxsize=1000)
def nearly_known(name, known):
    """The known name that an unknown one is nearly, or None.

    >>> nearly_known("measurments", ("name", "measurements")), nearly_known("colour", ("name",))
    ('measurements', None)
    """
    if not isinstance(name, str):
        return None
    for usual in USUAL_SLIPS.get(name.lower(), ()):
        if usual in known:
            return usual
    letters = bare_letters(name)
    for candidate in known:
        other = bare_letters(candidate)
        slips = 2 if len(other) >= 8 else 1
        if letters == other or within_slips(letters, other, slips):
            return candidate
    return None


def bare_letters(name):
    return name.lower().replace("_", "").replace("-", "")


def within_slips(word, other, most):
    """Whether so many slips make one word of the other.

    A slip is a letter too many, missing or wrong, or two neighbours that changed places.
    """
    words = [word, other]
    start = len(os.path.commonprefix(words))
    word = word[start:]
    other = other[start:]
    if word == other:
        return True
    if most == 0:
        return False
    rests = [
        (word[1:], other),          # a letter too many
        (word, other[1:]),          # one is missing
        (word[1:], other[1:]),      # one is wrong
    ]
    swapped = other[1::-1]
    if word[:2] == swapped:
        rests.append((word[2:], other[2:]))
    for left, right in rests:
        if within_slips(left, right, most - 1):
            return True
    return False


def check_record(record, value, path, findings, begin=None):
    """A JSON object as it goes over the wire; what is wrong with it is added to the findings.

    `begin` (epoch seconds) is the start of the run: see local_reading.
    """
    prefix = path + "." if path else ""
    wire = {}
    if record.has_times:
        begin = begin_of(value, begin)
    for key, item in value.items():
        field = record.by_name.get(key)
        if field is None:
            findings.unknown_field(record, key, f"{prefix}{key}")
            wire[key] = check_one(ANYTHING, item, f"{prefix}{key}", findings)
        elif item is None:
            wire[key] = None
            if not field.null:
                findings.problems.append(f"{prefix}{key}: null is not allowed, leave it out")
        elif field.is_plain:
            try:
                wire[key] = field.check(item, field)
            except (ValueError, OverflowError) as error:
                findings.problems.append(f"{prefix}{key}: {error}")
                wire[key] = item
        elif field.many:
            wire[key] = check_list(field, item, f"{prefix}{key}", findings, begin)
        else:
            wire[key] = check_one(field, item, f"{prefix}{key}", findings, begin)
            if field.kind == "time":
                wire[key] = local_reading(item, wire[key], begin)
    for name in record.required:
        if name not in value:
            findings.problems.append(f"{prefix}{name}: missing")
        elif value[name] == [] and record.by_name[name].kind == "id":
            findings.problems.append(f"{prefix}{name}: is empty")
    if record.has_times:
        check_order_of_times(wire, prefix, findings)
    if record is MEASUREMENT:
        check_lengths(wire, prefix, findings)
    if record is VALIDATOR:
        warn_of_operator(wire, prefix, findings)
    return wire


ANYTHING = Field("anything", "any")
SCALAR = Field("scalar", "scalar")


def begin_of(value, begin):
    """The start of a record with times, in epoch seconds: its own, or that of the run around it."""
    try:
        own = local_reading(value["started_at"], parse_time(value["started_at"]), begin)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return begin
    return epoch(own)


def check_order_of_times(wire, prefix, findings):
    start = epoch(wire.get("started_at"))
    end = epoch(wire.get("ended_at"))
    if start is not None and end is not None and end < start:
        findings.problems.append(f"{prefix}ended_at: {wire['ended_at']} is before started_at, "
                                 f"{wire['started_at']}")


def check_lengths(measurement, prefix, findings):
    """A series has a value of y for each of x."""
    count = data_length(measurement.get("x_axis"))
    if count is None:
        return
    axes = measurement.get("y_axis")
    if not isinstance(axes, list):
        return
    for number, axis in enumerate(axes):
        length = data_length(axis)
        if length not in (None, count):
            findings.problems.append(f"{prefix}y_axis[{number}].data: has {length} values, "
                                     f"x_axis has {count}")


def warn_of_operator(validator, prefix, findings):
    """The server takes any operator, and nobody can read what an unknown one means.

    It takes a comparison with nothing too.
    """
    operator = validator.get("operator")
    if not isinstance(operator, str):
        return
    if operator not in OPERATORS:
        known = " ".join(OPERATORS)
        findings.warnings.append(f"{prefix}operator: {operator[:20]!r} is not one of {known}")
    elif validator.get("expected_value") is None and operator in COMPARISONS:
        if validator.get("expression") is None:
            findings.warnings.append(f"{prefix}expected_value: missing, to compare with")


def data_length(axis):
    """How many values an axis has, or None for what is none."""
    data = axis.get("data") if isinstance(axis, dict) else None
    return len(data) if isinstance(data, list) else None


def check_list(field, items, path, findings, begin=None):
    if not isinstance(items, (list, tuple)):
        findings.problems.append(f"{path}: must be a list")
        return items
    if field.kind == "number" and all_finite(items):
        return list(items)
    return [check_one(field, item, f"{path}[{number}]", findings, begin)
            for number, item in enumerate(items)]


def all_finite(items):
    """Whether all are numbers of JSON. For long series: without a function call for each."""
    types = set(map(type, items))
    try:
        return types <= {int, float} and all(map(math.isfinite, items))
    except OverflowError:       # an integer that is larger than any float
        return False


def check_one(field, value, path, findings, begin=None):
    if field.record:
        if isinstance(value, dict):
            return check_record(field.record, value, path, findings, begin)
        findings.problems.append(f"{path}: must be a JSON object")
        return value
    try:
        wire = field.check(value, field)
    except (ValueError, OverflowError) as error:
        findings.problems.append(f"{path}: {error}")
        return value
    if field.kind == "metadata":
        return check_keys(wire, path, findings)
    return wire


def local_reading(written, wire, begin):
    """A local time in its second reading where the first would lie before the start of the run.

    In the hour that autumn has twice, a time without an offset has two readings.
    """
    first = epoch(wire)
    if begin is None or first is None or first >= begin or not isinstance(written, str):
        return wire
    second = parse_time(written, fold=1)
    return second if epoch(second) >= begin else wire


def check_keys(value, path, findings):
    """Metadata as it goes over the wire; each problem names its key."""
    if len(value) > 50:
        findings.problems.append(f"{path}: has {len(value)} keys, the server takes 50")
    wire = {}
    for key, item in value.items():
        name = f"{path}.{printable(key, 60)}"
        if isinstance(item, datetime.datetime):
            item = to_json(item)
        wire[key] = item
        text = str(key)
        if len(text) > 40 or not re.fullmatch(_IDENTIFIER, text):
            wrong = re.sub(_IDENTIFIER, "", text)
            advice = advice_on(wrong) if wrong else ""
            findings.problems.append(
                f"{name}: a key has 1 to 40 of {IDENTIFIER_CHARACTERS}{advice}")
        if not isinstance(key, str):
            findings.problems.append(f"{name}: a key must be text")
        if item is not None:
            check_one(SCALAR, item, name, findings)
        if isinstance(item, str) and len(item) > 50000:
            findings.problems.append(f"{name}: is longer than 50,000 characters")
    return wire


def check_create(body, problems):
    """The rules of a create that reach over several fields, for a body that is right in each."""
    for name, needed in (("slot_key", "execution_id"), ("slot_name", "slot_key")):
        if body.get(name) and not body.get(needed):
            problems.append(f"{name}: needs {needed}")
    if "operated_by" in body and not body["operated_by"].strip():
        problems.append("operated_by: is empty")
    for name in ("metadata", "unit_metadata"):
        for key, item in body.get(name, {}).items():
            if item is None:
                problems.append(f"{name}.{key}: null deletes a key, and a new run has none")
    check_sequences(body, problems)
    for number, row in enumerate(body.get("secrets", ())):
        if "value" in row:
            problems.append(f"secrets[{number}].value: never send the value of a secret")


def warn_of_verdicts(body, warnings):
    """Warns of a PASS that contains a FAIL: the server stores outcomes as they are.

    A phase that failed is excused by a later one of the same name: that is its retry.
    """
    failed = {}     # by name, the last try of each phase, where that failed
    for number, phase in enumerate(body.get("phases", ())):
        path = f"phases[{number}]"
        outcome = phase["outcome"]
        name = (phase["name"], phase.get("sequence_path"))
        failed.pop(name, None)
        if outcome in ("FAIL", "ERROR"):
            failed[name] = f"{path}.outcome: {outcome}, and the run is PASS"
        for place, measurement in enumerate(phase.get("measurements") or ()):
            warn_of_measurement(measurement, f"{path}.measurements[{place}]", outcome, warnings)
    if body["outcome"] == "PASS":
        warnings += failed.values()


def warn_of_measurement(measurement, path, phase_outcome, warnings):
    """Tells a failure in what is PASS, and limits that nobody means."""
    outcome = measurement["outcome"]
    if outcome == "FAIL" and phase_outcome == "PASS":
        warnings.append(f"{path}.outcome: FAIL, and its phase is PASS")
    bounds = []         # (place, operator, limit) of what decides
    for name, operator in (("lower_limit", ">="), ("upper_limit", "<=")):
        if name in measurement:
            bounds.append((name, operator, measurement[name]))
    for number, rule in enumerate(measurement.get("validators") or ()):
        if rule.get("is_decisive") is False:
            continue
        operator = rule.get("operator")
        if rule.get("outcome") == "FAIL" and outcome == "PASS":
            place = f"{path}.validators[{number}]"
            warnings.append(f"{place}.outcome: FAIL, and its measurement is PASS")
        elif operator in BOUNDS:
            bounds.append((number, operator, rule.get("expected_value")))
    value = measurement.get("measured_value")
    if value is not None and (measurement.get("x_axis") or measurement.get("y_axis")):
        warnings.append(f"{path}.measured_value: beside a series (x_axis, y_axis), and get shows "
                        "the series alone")
    if not is_within_all(value, bounds):        # else nothing is odd, even for 90,000 of them
        for place, reason in doubts_about(value, outcome, bounds):
            if isinstance(place, int):
                place = f"validators[{place}].expected_value"
            warnings.append(f"{path}.{place}: {reason}")


def is_within_all(value, bounds):
    """Whether a value and its limits are numbers, and it is within all of them."""
    if bounds and not is_number(value):
        return False
    for _, operator, limit in bounds:
        if not is_number(limit):
            return False
        if value == limit and operator in (">", "<"):
            return False
        if value < limit and operator in LOWER:
            return False
        if value > limit and operator in UPPER:
            return False
    return True


def doubts_about(value, outcome, bounds):
    """(place, reason) of what is odd about a measured value and its limits.

    The reasons hold no values, but after "write": so many of a kind are told as one.
    """
    numbers = [bound for bound in bounds if is_number(bound[2])]
    if isinstance(value, str):
        if numbers:
            reason = "is text, and its limits are numbers" + number_meant(value)
            yield "measured_value", reason
        return
    lower = [bound for bound in numbers if bound[1] in LOWER]
    upper = [limit for _, operator, limit in numbers if operator in UPPER]
    for place, _, limit in lower:
        if upper and limit > min(upper):
            yield place, "the lower limit is above the upper limit"
            return
    if not is_number(value):
        return
    for place, _, limit in bounds:
        if isinstance(limit, str):
            yield place, "is text, and the measured value is a number"
    if outcome == "PASS" and not is_within_all(value, numbers):
        yield "outcome", "PASS, and the measured value is outside of its limits"


def number_meant(text):
    """How to write a number that is given as text, perhaps with its unit; nothing for all else.

    >>> number_meant("3,31"), number_meant("3.31 V"), number_meant("1.4.0")
    (': write 3.31, with a decimal point', ': write 3.31, and V as units', '')
    """
    match = re.fullmatch(r"(?a)(-?(?:0|[1-9]\d*)([.,]\d+)?) *([^\s\d.,]{0,10})", text.strip())
    if not match:
        return ""
    number, fraction, units = match.groups("")
    advice = ": write " + number.replace(",", ".")
    if units:
        return f"{advice}, and {units} as units"
    if fraction[:1] == ",":
        return advice + ", with a decimal point"
    return advice + ", without quotes"


def warn_of_phase_times(body, warnings):
    """Tells phases that lie more than a day apart from their run: the clock was set, or a slip."""
    begin = epoch(body["started_at"]) - DAY
    end = epoch(body["ended_at"]) + DAY
    for number, phase in enumerate(body.get("phases", ())):
        if epoch(phase["started_at"]) < begin:
            warnings.append(f"phases[{number}].started_at: more than a day before the run")
        if epoch(phase["ended_at"]) > end:
            warnings.append(f"phases[{number}].ended_at: more than a day after the run")


def check_sequences(body, problems):
    """Each path stands once, its parent stands there too, and phases name paths that are there."""
    paths = set()
    for number, row in enumerate(body.get("sequences") or ()):
        path = row["path"]
        if path in paths:
            problems.append(f"sequences[{number}].path: {path} is given twice")
        paths.add(path)
    for number, row in enumerate(body.get("sequences") or ()):
        parent = row["path"].rpartition("/")[0]
        if parent and parent not in paths:
            problems.append(f"sequences[{number}].path: its parent {parent} is missing")
    for number, row in enumerate(body.get("phases", ())):
        path = row.get("sequence_path")
        if path is not None and path not in paths:
            problems.append(f"phases[{number}].sequence_path: no sequence has the path {path}")


def examine(operation, values):
    """(the values as they go over the wire, Findings) of an operation."""
    record = OPERATIONS[operation].record
    findings = Findings(keeps_unknown=operation == "create")
    given = {}
    for key, value in values.items():
        field = record.by_name.get(key)
        alone = field is not None and field.many and isinstance(value, str)
        given[key] = [value] if alone else value
    wire = check_record(record, given, "", findings)
    if operation == "create" and not findings.problems:
        check_create(wire, findings.problems)
        warn_of_verdicts(wire, findings.warnings)
        warn_of_phase_times(wire, findings.warnings)
    metadata = wire.get("metadata")
    if operation == "list" and isinstance(metadata, dict):
        check_metadata_filter(metadata, findings.problems)
    findings.problems.sort(key=is_nested)
    return wire, findings


def check_metadata_filter(metadata, problems):
    if len(metadata) > 5:
        problems.append("metadata: at most 5 keys can be asked for")
    for key, rule in metadata.items():
        if not isinstance(rule, dict):
            such = '{"in": ["A", "B"]} or {"gte": 1.5}'
            problems.append(f"metadata.{printable(key, 60)}: needs a comparison, such as {such}")


def is_nested(problem):
    """Whether a problem is not of a field of the request itself."""
    return not re.match(r"\w+: ", problem)


def check(operation, values):
    """The values of an operation as they go over the wire; BadInput with all problems at once."""
    wire, findings = examine(operation, values)
    if findings.problems:
        raise problems_error(findings.problems)
    return wire


def problems_error(problems):
    """The BadInput that tells some problems."""
    if len(problems) == 1:
        return BadInput(problems[0])
    return BadInput(f"{len(problems)} problems in the input, nothing was sent", issues=problems)


def named_by_flags(problems, record):
    """The problems with a field of the request itself named by its flag.

    >>> named_by_flags(["serial_number: missing", "phases[0].name: missing"], CREATE)
    ['--serial-number: missing', 'phases[0].name: missing']
    """
    def flag_of(match):
        field = record.by_name.get(match.group(1))
        inside_json = match.group(2) and (field is None or field.kind in JSON_KINDS)
        return match.group() if field is None or inside_json else flag_name(match.group(1))
    return [re.sub(r"^(\w+)(\[\d+\])?(?=: )", flag_of, problem) for problem in problems]


def run_ref(body):
    """The client_run_ref of a create: SHA-256 of its content, the same in all releases.

    Keys sorted, every time of the table in UTC, without the ref itself.

    >>> run_ref({"started_at": "2026-05-19T10:00:00+02:00"})[:16]
    'd5088dd6c3b9ff9c'
    """
    content = {key: item for key, item in body.items() if key != "client_run_ref"}
    content = with_utc_times(content, CREATE)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sha256_of_text(text)


def with_utc_times(value, record):
    """The JSON object with each time of its table in UTC; what is no time stays as written."""
    if not isinstance(value, dict) or not record.has_times:
        return value
    found = {}
    for key, item in value.items():
        field = record.by_name.get(key)
        if field is None:
            found[key] = item
        elif field.kind == "time":
            found[key] = item if epoch(item) is None else utc_text(item)
        elif field.record and isinstance(item, list):
            found[key] = [with_utc_times(part, field.record) for part in item]
        else:
            found[key] = item
    return found


def with_ref(body):
    """The checked body of a create with its client_run_ref, made from the content if not given."""
    if body.get("client_run_ref"):
        return body
    return dict(body, client_run_ref=run_ref(body))


# All that can stand in a run, as an example that a server takes as it is.
EXAMPLE_RUN = {
    "outcome": "FAIL",
    "procedure_id": "proc_abc",
    "procedure_version": "1.2.3",
    "serial_number": "SN-0002",
    "part_number": "PCB01",
    "revision_number": "B",
    "batch_number": "2026-W20",
    "sub_units": ["PSU-0001"],
    "started_at": "2026-05-19T08:10:00+02:00",
    "ended_at": "2026-05-19T08:11:35+02:00",
    "operated_by": "Ada",
    "docstring": "second try",
    "metadata": {"shift": "A", "temp": 23.4},
    "phases": [
        {
            "name": "power_up",
            "outcome": "PASS",
            "started_at": "2026-05-19T08:10:00+02:00",
            "ended_at": "2026-05-19T08:10:12+02:00",
            "measurements": [
                {
                    "name": "vcc",
                    "outcome": "PASS",
                    "measured_value": 3.31,
                    "units": "V",
                    "validators": [
                        {
                            "operator": ">=",
                            "expected_value": 3.1,
                            "outcome": "PASS",
                        },
                        {
                            "operator": "<=",
                            "expected_value": 3.4,
                            "outcome": "PASS",
                        },
                    ],
                },
                {
                    "name": "firmware",
                    "outcome": "PASS",
                    "measured_value": "1.4.0",
                    "validators": [
                        {
                            "operator": "==",
                            "expected_value": "1.4.0",
                            "outcome": "PASS",
                        },
                    ],
                },
                {
                    "name": "led_on",
                    "outcome": "PASS",
                    "measured_value": True,
                },
            ],
        },
        {
            "name": "rf_power",
            "outcome": "FAIL",
            "started_at": "2026-05-19T08:10:12+02:00",
            "ended_at": "2026-05-19T08:11:30+02:00",
            "retry_count": 0,
            "measurements": [
                {
                    "name": "tx_power",
                    "outcome": "FAIL",
                    "measured_value": 17.1,
                    "units": "dBm",
                    "validators": [
                        {
                            "operator": ">=",
                            "expected_value": 18.0,
                            "outcome": "FAIL",
                        },
                    ],
                },
                {
                    "name": "gain",
                    "outcome": "UNSET",
                    "x_axis": {
                        "name": "frequency",
                        "units": "Hz",
                        "data": [1000, 2000, 4000],
                    },
                    "y_axis": [
                        {
                            "name": "gain",
                            "units": "dB",
                            "data": [0.1, 0.0, -0.4],
                        },
                    ],
                },
            ],
        },
    ],
    "logs": [
        {
            "level": "WARNING",
            "timestamp": "2026-05-19T08:10:20+02:00",
            "message": "tx power below its limit",
            "source_file": "rf.py",
            "line_number": 42,
        },
    ],
}


# ---- login ---------------------------------------------------------------------------------------

# url: the server in force; key: its API key or None; source: where the key comes from; slug: the
# organization's, for links to runs; ca_cert: a path or None.
Login = collections.namedtuple("Login", "url key source slug ca_cert")


def home():
    """The TofuPilot folder: TOFUPILOT_HOME, else ~/.tofupilot (on Windows below USERPROFILE)."""
    folder = os.environ.get("TOFUPILOT_HOME")
    if not folder:
        user = os.path.expanduser("~")
        if ON_WINDOWS and os.environ.get("USERPROFILE"):
            user = os.environ["USERPROFILE"]
        if user.startswith("~"):
            raise BadInput("this user has no home folder",
                           set_variable("TOFUPILOT_HOME", "FOLDER") + " names another place")
        folder = os.path.join(user, ".tofupilot")
    return os.path.abspath(folder)


def environment(name):
    """An environment variable without the quotes that cmd's set leaves around it, or None."""
    value = os.environ.get(name, "").strip()
    return without_quotes(value) or None


def without_quotes(text):
    """A text without the quotes around it."""
    first, last = text[:1], text[-1:]
    if len(text) > 1 and first == last and first in "\"'":
        return text[1:-1]
    return text


def set_variable(name, value):
    """The shell's line that sets a variable, for hints."""
    command = "set" if ON_WINDOWS else "export"
    return f"{command} {name}={value}"


def is_this_machine(host):
    if host in ("localhost", "::1"):
        return True
    octets = (host or "").split(".")
    is_address = len(octets) == 4 and all(octet.isdigit() and int(octet) < 256 for octet in octets)
    return is_address and octets[0] == "127"


def check_url(raw, allow_http, what):
    """The parts of an https URL (http where allowed); ValueError for all else, before its use.

    Plain http is for this machine alone, or with `allow_http`.
    """
    from urllib.parse import urlsplit
    require(isinstance(raw, str) and raw, f"{what} is empty")
    require(re.fullmatch(r"[!-\[\]-~]+", raw),
            f"{what} has spaces or other characters that a URL cannot have")
    parts = urlsplit(raw)
    require("@" not in parts.netloc, f"{what} must not hold a user name or password")
    require(parts.scheme in ("https", "http") and parts.hostname,
            f"{what} must begin with https://")
    require(parts.port != 0, f"{what} has an invalid port")    # and raises where it is no number
    if parts.scheme == "http" and not is_this_machine(parts.hostname):
        require(allow_http, f"{what} is plain http: others can read what is sent.\n"
                "Use https, or --allow-http where the network is trusted")
    return parts


def parse_origin(text, allow_http=False, what="--url"):
    """https://host[:port] of a server's address, with or without /api at its end.

    In lower case and without the default port, so that two spellings of one server are equal.

    >>> parse_origin("https://TofuPilot.example.com:443/api/")
    'https://tofupilot.example.com'
    """
    try:
        parts = check_url(text, allow_http, what)
        path = parts.path.rstrip("/")
        is_alone = path in ("", "/api") and not parts.query + parts.fragment
        require(is_alone, f"{what} must be the address of the server alone")
    except ValueError as error:
        hint = f"give an address such as {CLOUD}"
        if is_this_machine(str(text).partition(":")[0]):
            hint = f"did you mean {what} http://{text}?"
        raise BadInput(str(error), hint) from None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default_port = {"https": 443, "http": 80}[parts.scheme]
    if parts.port in (None, default_port):
        return f"{parts.scheme}://{host}"
    return f"{parts.scheme}://{host}:{parts.port}"


def normal_url(text):
    """A server's address in the spelling by which two are compared; an odd one as it is."""
    try:
        return parse_origin(text, allow_http=True)
    except BadInput:
        return text.lower()


def read_credentials(warn):
    """(path, fields) of the first credentials file that has a key, or (None, {}).

    AccessDenied for one that cannot be read.
    """
    for name in ("credentials.json", "station.json"):
        try:
            path = os.path.join(home(), name)
            with open(path, "rb") as file:
                warn_of_readers(path, os.fstat(file.fileno()), warn)
                found = load_json(decode_text(file.read(ERROR_LIMIT)))
            require(isinstance(found, dict) and isinstance(found.get("api_key", ""), str),
                    "it is not a JSON object with a text api_key")
        except (BadInput, FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise AccessDenied(f"cannot use {path}: {error}",
                               "repair or remove the file, or log in again") from None
        if found.get("api_key"):
            return path, found
    return None, {}


def warn_of_readers(path, state, warn):
    """Warns of a key file that other users can read, or own."""
    if is_open_to_others(state):
        warn(f"{path} can be read by other users: chmod 600 it")


def is_open_to_others(state):
    """Whether others can read a file, from what os.stat says of it. Windows has no such modes."""
    if ON_WINDOWS:
        return False
    return bool(state.st_mode & 0o077) or state.st_uid not in (0, os.getuid())


def find_login(url=None, api_key=None, source="api_key", allow_http=False, warn=print):
    """Which server, and the key for it: argument, environment, credentials file, in this order.

    A key from a credentials file goes to that file's base_url, or to a URL that was named
    explicitly. BadInput for a URL that cannot be used, AccessDenied for a key that cannot.
    """
    if api_key is None and environment("TOFUPILOT_API_KEY"):
        api_key = environment("TOFUPILOT_API_KEY")
        source = "environment TOFUPILOT_API_KEY"
    origin = named_origin(url, allow_http)
    try:
        path, found = read_credentials(warn)
    except AccessDenied as error:
        if api_key is None or origin is None:
            raise
        warn(error.text)
        path, found = None, {}
    base_url = found.get("base_url")
    if base_url or path and not origin:     # a key without its server goes nowhere
        written = str(base_url).rstrip("/")
        base_url = parse_origin(written, allow_http, f"base_url in {path}")
    if api_key is None and path:
        api_key = found["api_key"]
        source = path
    if api_key is not None:
        api_key = check_key(api_key, source)
    slug = None
    if base_url and origin in (None, base_url):
        slug = found.get("organization_slug")
    ca_cert = found.get("ca_cert")
    if not isinstance(ca_cert, str):
        ca_cert = None
    return Login(origin or base_url or CLOUD, api_key, source, slug, ca_cert)


def check_key(key, source):
    key = without_quotes(str(key).strip())
    if not re.fullmatch("[!-~]{8,512}", key):
        reason = f"it has {len(key)} characters, a key has 8 to 512"
        if re.search(r"\s", key):
            reason = "it has a space or a line end"
        elif not re.fullmatch("[!-~]*", key):
            reason = "it has a character that no key has"
        raise AccessDenied(f"{source} is not an API key: {reason}", "copy the key again")
    return key


def named_origin(url, allow_http):
    """The server that --url or TOFUPILOT_URL names, or None."""
    if url is not None:
        return parse_origin(url, allow_http)
    variable = environment("TOFUPILOT_URL")
    return parse_origin(variable, allow_http, "TOFUPILOT_URL") if variable else None


def named_server(url, allow_http, warn):
    """The server that an entry of the queue is for, or None where none was named.

    Named is one by --url, TOFUPILOT_URL or the credentials file. The name is kept, not judged: what
    is wrong with it is a warning, and is told again when the run is sent.
    """
    written = url or environment("TOFUPILOT_URL")
    if written is None:
        try:
            written = read_credentials(lambda text: None)[1].get("base_url")
        except AccessDenied as error:
            warn(error.text)
    if not isinstance(written, str) or not written.strip():
        return None
    try:
        parse_origin(written.strip().rstrip("/"), allow_http)
    except BadInput as error:
        warn(error.text)
    return normal_url(written.strip().rstrip("/"))


def no_key():
    """The AccessDenied for a command without an API key."""
    folder = os.environ.get("TOFUPILOT_HOME") or os.path.join("~", ".tofupilot")
    elsewhere = "cron does not see your shell's variables: use --api-key-file there"
    if ON_WINDOWS:
        elsewhere = "the Task Scheduler does not see them: use --api-key-file there"
    return AccessDenied("no API key. Looked at TOFUPILOT_API_KEY, --api-key-file,\n"
                        f"{os.path.join(folder, 'credentials.json')} and station.json.",
                        f"{set_variable('TOFUPILOT_API_KEY', '<key>')}\n{elsewhere}")


# ---- transport -----------------------------------------------------------------------------------

KEY_WORD = "(the key)"      # what is shown in its place

# headers: a dict with names in lower case; data: the body, empty where a sink took it.
Answer = collections.namedtuple("Answer", "status headers data")


def start_thread(work, *args):
    """Runs work(*args) in a thread of its own. Returns a function that waits for its result.

    wait() returns what work returned, or raises what it raised; wait(seconds) gives up after that
    and returns None. It waits in short steps, as Windows lets no Ctrl-C into a long one. A bare
    thread costs half of threading.Thread: a list has one for each page.
    """
    outcome = {}
    running = _thread.allocate_lock()
    running.acquire()

    def run():
        try:
            outcome["result"] = work(*args)
        except BaseException as error:
            outcome["error"] = error
        running.release()

    def wait(seconds=math.inf):
        until = time.monotonic() + seconds
        left = seconds
        while running.locked() and left > 0:
            if running.acquire(timeout=min(0.2, left)):
                running.release()
            left = until - time.monotonic()
        if "error" in outcome:
            raise outcome["error"]
        return outcome.get("result")
    _thread.start_new_thread(run, ())
    return wait


class Exchange:
    """One request to a server, and how far it came.

    `stage` is "connecting", then "sent"; or "reused" on a kept connection, until something came
    back. `late`: its time ran out first.
    """

    def __init__(self, method, url, content, sink, timeout, budget, before_send):
        self.method = method
        self.url = url
        self.content = content
        self.sink = sink
        self.timeout = timeout
        self.budget = budget
        self.before_send = before_send
        self.deadline = time.monotonic() + budget
        self.running = _thread.allocate_lock()      # released at its end
        self.running.acquire()
        self.stage = "connecting"
        self.sock = None
        self.late = False

    def connect(self, address, *_):
        """A socket to one of the addresses of a host, for http.client.

        All of them together get the time of the exchange: many dead ones cannot multiply it.
        """
        import socket
        failure = socket.timeout()
        for family, kind, protocol, _, where in socket.getaddrinfo(
                *address, type=socket.SOCK_STREAM):
            left = self.deadline - time.monotonic()
            if left <= 0:
                break
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(min(CONNECT_TIMEOUT, self.timeout, left))
                sock.connect(where)
            except OSError as error:
                sock.close()
                failure = error
            else:
                self.sock = sock
                return sock
        raise failure

    def break_off(self):
        """Ends all waits of the exchange: no time-out of a socket sees a slow drip."""
        import socket
        with contextlib.suppress(TypeError, OSError):   # not connected yet, or gone already
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def watch(self):
        """Breaks it off when its time is over. Runs in a thread of its own."""
        if not self.running.acquire(timeout=min(self.budget, _thread.TIMEOUT_MAX)):
            self.late = True
            self.break_off()


class Transport:
    """Exchanges with the API and the storage; raises Unavailable where there is no answer.

    urllib.request closes a connection after each request; http_open, which it calls, keeps one for
    each host and proxy. No redirect is followed: there is no handler for them. Whatever a
    peer says has its secrets masked before anybody sees it.
    """
    is_dry_run = False

    def __init__(self, timeout=30, ca_cert=None, trace=None):
        self.timeout = timeout
        self.ca_cert = ca_cert
        self.trace = trace
        self.context = None
        self.pool = {}              # kept connections, by scheme, host and tunnel
        self.pid = os.getpid()
        self.secrets = {}           # what must not be shown: what stands in its place
        self.server_clock = None    # (the server's time, ours) at the last answer that told it
        self.was_overloaded = False     # whether a server answered 429 or 503

    def close(self):
        """Closes the kept connections."""
        while self.pool:
            self.pool.popitem()[1].close()

    def hide(self, secret, word):
        """From now on shows a word in place of a secret, in each form a peer may give it."""
        from urllib.parse import quote
        in_json = json.dumps(secret)[1:-1]
        in_url = quote(secret, safe="")
        forms = dict.fromkeys((secret, in_json, in_url), word)
        self.secrets = dict(self.secrets, **forms)      # anew: another thread may walk the old one

    def mask(self, text):
        """The text without the secrets."""
        return replace_all(text, self.secrets)

    def mask_body(self, data, status):
        """The body of an answer without the secrets, in whatever spelling of JSON they stand.

        Where the request succeeded only the key is masked: a short password of a proxy may stand
        among the data by chance.
        """
        secrets = self.secrets
        if status < 300:
            secrets = {secret: word for secret, word in secrets.items() if word == KEY_WORD}
        data = replace_all(data, {secret.encode("utf-8"): word.encode("utf-8")
                                  for secret, word in secrets.items()})
        if b"\\" not in data and b"\0" not in data:    # no escapes, no UTF-16
            return data
        try:
            text = json.dumps(load_json(data), ensure_ascii=False)
        except ValueError:
            return data
        shown = replace_all(text, secrets)
        if shown == text:
            return data
        return shown.encode("utf-8", "backslashreplace")

    def proxy_for(self, parts):
        """The proxy for a URL, or None. Its password is known as a secret from now on."""
        from urllib.request import getproxies, proxy_bypass
        from urllib.parse import quote, unquote
        if is_this_machine(parts.hostname) or proxy_bypass(parts.hostname):
            return None
        proxy = getproxies().get(parts.scheme)
        if not proxy:
            return None
        if proxy.lower().startswith("socks"):
            raise NotSent(f"the proxy {without_login(proxy)} is a SOCKS proxy, which is not "
                          "supported",
                          f"name an http proxy in {parts.scheme.upper()}_PROXY, or none")
        before = proxy.rpartition("@")[0]
        if not before:
            return proxy
        login = before.partition("://")[2] or before
        user, _, password = login.partition(":")
        if login not in self.secrets:
            self.hide_proxy_login(user, password)
        # urllib cannot read a password that has a / or # as it is.
        user = quote(unquote(user), safe="")
        password = quote(unquote(password), safe="")
        scheme, _, host = without_login(proxy).rpartition("://")
        return f"{scheme or 'http'}://{user}:{password}@{host}"

    def hide_proxy_login(self, user, password):
        """Hides what a proxy's address holds, and how it goes to the proxy."""
        import base64
        from urllib.parse import unquote
        login = f"{user}:{password}"
        plain = unquote(login)
        header = base64.b64encode(plain.encode("utf-8")).decode("ascii")
        for secret in (login, plain, header):
            self.hide(secret, "(login)")
        if len(password) > 3:
            self.hide(password, "(password)")
            self.hide(unquote(password), "(password)")

    def opener_for(self, parts):
        """What opens a URL: through its proxy, with the connections that are kept here."""
        import urllib.request
        proxy = self.proxy_for(parts)
        proxies = {parts.scheme: proxy} if proxy else {}
        kept = urllib.request.BaseHandler()
        kept.http_open = kept.https_open = self.http_open
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.ProxyHandler(proxies))
        opener.add_handler(kept)
        return opener

    def make_context(self):
        """TLS 1.2 or newer, the system's certificates and the private CA."""
        import ssl
        os.environ.pop("SSLKEYLOGFILE", None)     # it would write the keys of the session down
        context = ssl.create_default_context()
        if hasattr(ssl, "TLSVersion"):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        else:
            context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        if self.ca_cert:
            try:
                context.load_verify_locations(self.ca_cert)
            except OSError as error:
                raise BadInput(f"cannot use the CA file {self.ca_cert}: "
                               f"{error.strerror or 'it holds no certificate'}",
                               "name a file of certificates in PEM form") from None
            # Since 3.13 a certificate must have a form that older private CAs lack.
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        return context

    def new_connection(self, request, proxy_headers):
        import http.client
        if request.type == "https":
            try:
                self.context = self.context or self.make_context()
            except ImportError:
                raise NotSent("this Python has no ssl module: it cannot speak https",
                              "use a Python that has it; check shows which one this is") from None
            connection = http.client.HTTPSConnection(request.host, context=self.context)
        else:
            connection = http.client.HTTPConnection(request.host)
        connection._create_connection = request.exchange.connect
        if request._tunnel_host:
            connection.set_tunnel(request._tunnel_host, headers=proxy_headers)
        return connection

    def http_open(self, request):
        """The Answer to a request, for urllib.request."""
        exchange = request.exchange
        headers = dict(request.header_items())
        proxy_headers = {}
        if request._tunnel_host and "Proxy-authorization" in headers:
            proxy_headers["Proxy-Authorization"] = headers.pop("Proxy-authorization")
        if self.pid != os.getpid():     # after a fork: these connections are the parent's
            self.pool = {}
            self.pid = os.getpid()
        key = (request.type, request.host, request._tunnel_host)
        connection = self.pool.pop(key, None)
        if connection:
            exchange.stage = "reused"
        else:
            connection = self.new_connection(request, proxy_headers)
        try:
            answer, keep = self.exchange_on(connection, exchange, request, headers)
        except BaseException:
            connection.close()
            raise
        if keep:
            self.pool[key] = connection
        else:
            connection.close()
        return answer

    def exchange_on(self, connection, exchange, request, headers):
        """(the Answer, whether the connection can be kept)."""
        if exchange.stage == "connecting":
            connection.connect()
        exchange.sock = connection.sock
        if exchange.late:       # during a handshake, which a shutdown does not end
            raise EOFError
        exchange.sock.settimeout(request.timeout)
        if exchange.before_send:
            exchange.before_send()
        if exchange.stage == "connecting":
            exchange.stage = "sent"
        content = exchange.content
        if callable(content):
            content = content()
        try:
            connection.request(exchange.method, request.selector, content, headers)
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
            # A server may refuse a body before it has read it all: listen to what it says.
            if exchange.stage == "reused" or not content:
                raise
        finally:
            if callable(exchange.content):
                content.close()
        with connection.getresponse() as response:
            exchange.stage = "sent"     # something came back: the kept connection is alive
            answer = self.read(exchange, response)
        return answer, not response.will_close

    def read(self, exchange, response):
        """The Answer of a response; the exchange's sink takes the body of a 200, in blocks."""
        from urllib.parse import urlsplit
        status = response.status
        host = urlsplit(exchange.url).netloc
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise not_the_api(host, status, "an encoding not asked for")
        sink = exchange.sink if status == 200 else None
        limit = ANSWER_LIMIT if status < 300 else ERROR_LIMIT
        pieces, size = [], 0
        # In blocks: before 3.12 read(n) takes n bytes of memory at once.
        for block in iter(lambda: response.read(BLOCK), b""):
            size += len(block)
            if sink:
                sink(block)
            elif size > limit:
                raise not_the_api(host, status, f"more than {limit >> 10} KiB")
            else:
                pieces.append(block)
        if response.length or exchange.late:    # a body that is cut short raises nothing
            raise EOFError
        headers = {name.lower(): self.mask(value) for name, value in response.getheaders()}
        server_time = http_date(headers.get("date"))
        self.server_clock = (server_time, time.time()) if server_time else None
        self.was_overloaded = self.was_overloaded or status in OVERLOADED
        return Answer(status, headers, self.mask_body(b"".join(pieces), status))

    def exchange(self, method, url, headers, content=None, budget=None, sink=None,
                 before_send=None):
        """The Answer to one request.

        `content` is None, bytes, or a function that makes a generator of blocks; `sink` takes the
        blocks of a 200's body; `before_send` is called once a connection stands, right before the
        first byte goes out. `budget`: seconds for all of it, connecting included.
        """
        import urllib.request
        from urllib.parse import urlsplit
        opener = self.opener_for(urlsplit(url))
        exchange = Exchange(method, url, content, sink, self.timeout,
                            budget or 1.5 * self.timeout, before_send)
        request = urllib.request.Request(url, headers=headers, method=method)
        request.exchange = exchange
        try:
            _thread.start_new_thread(exchange.watch, ())
        except RuntimeError as error:   # no thread can be started
            raise NotSent(f"this machine cannot do more at the same time: {error}") from None
        started, outcome = time.monotonic(), None
        try:
            answer = interruptible(exchange, opener.open, request, None, self.timeout)
            outcome = answer.status
            return answer
        except Error as error:
            outcome = type(error).__name__
            raise
        except Exception as error:      # http.client, ssl and socket have no common ancestor
            outcome = type(error).__name__
            raise self.connection_error(exchange, error) from None
        finally:
            exchange.running.release()
            if self.trace:
                took = 1000 * (time.monotonic() - started)
                shown = self.mask(shown_url(url))
                self.trace(f"{method} {shown} {outcome} {took:.0f} ms")

    def connection_error(self, exchange, error):
        """The Unavailable for an exchange that got no answer: what, why, what to do."""
        from urllib.parse import urlsplit
        parts = urlsplit(exchange.url)
        reason, hint, retryable = self.reason_of(exchange, error)
        reason = self.mask(reason)
        if exchange.stage == "connecting":
            found = Unavailable(f"cannot reach {parts.netloc}: {reason}", hint, reason=reason)
            found.with_note(f"proxy: {without_login(self.proxy_for(parts) or 'none')}")
            found.maybe_sent = False
        else:
            found = Unavailable(f"no answer from {parts.netloc}: {reason}", reason=reason)
        found.retryable = retryable
        found.reused = exchange.stage == "reused" and not exchange.late
        return found

    def reason_of(self, exchange, error):
        """(why an exchange failed, what to do about it, whether another try may help)."""
        import socket
        later = "nothing was sent: check the name in --url and the network, or try again later"
        if exchange.late:
            return f"no complete answer within {exchange.budget:.0f} s", later, True
        text = self.mask(str(error))        # before it is cut anywhere
        name = type(error).__name__
        if "CERTIFICATE_VERIFY" in text or name == "CertificateError":
            reason = ("its certificate cannot be verified\n"
                      + (getattr(error, "verify_message", "") or text))
            if re.search("(?i)hostname|doesn't match|IP address mismatch", reason):
                return reason, "name the server in --url as its certificate does", False
            clock = time.strftime("%Y-%m-%d %H:%M")
            return reason, ("--ca-cert FILE (or TOFUPILOT_CA_CERT) adds a private CA. This "
                            f"machine's clock\nsays {clock}: if that is wrong, set it first"), False
        if name == "SSLError" and re.search(
                "(?i)wrong.version|record.layer|packet.length|http.request|unknown.protocol", text):
            return "it does not speak https but something else, such as plain http", (
                "check the port; begin --url with http:// if the server has no https"), False
        if isinstance(error, socket.gaierror):
            return "name not found (DNS)", later, True
        if isinstance(error, socket.timeout):
            return f"no answer within {exchange.timeout:g} s", later, True
        if name in ("EOFError", "IncompleteRead"):
            return "the answer was cut short", later, True
        reason = getattr(error, "strerror", None) or text or name
        return self.mask(reason)[:200], later, True


class DryRun(Transport):
    """Stands in for a Transport: keeps each request to be printed, and sends nothing."""
    is_dry_run = True

    def __init__(self):
        super().__init__()
        self.requests = []      # {"method", "url", "body"}

    def exchange(self, method, url, headers, content=None, budget=None, sink=None,
                 before_send=None):
        body = None
        if content and not callable(content):       # else a file
            body = json.loads(content.decode("ascii"))
        self.requests.append({"method": method, "url": url, "body": body})
        answer = {
            "id": [] if method == "DELETE" else "ID",
            "upload_url": "https://storage/URL",
            "url": "https://storage/URL",
            "type": "user",
            "data": [],
            "meta": {},
        }
        return Answer(200, {"content-type": "application/json"},
                      dump_json(answer).encode("ascii"))


def replace_all(text, words):
    """A text, or bytes, with each key of `words` replaced by its value."""
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def interruptible(exchange, work, *args):
    """work(*args), so that Ctrl-C can end its waits.

    Windows does not let Ctrl-C into a wait for a socket: there the wait is in a thread.
    """
    if not ON_WINDOWS:
        return work(*args)
    try:
        wait = start_thread(work, *args)
    except RuntimeError:        # no thread can be had: then Ctrl-C has to wait
        return work(*args)
    try:
        return wait()
    except KeyboardInterrupt:
        exchange.break_off()
        raise


def shown_url(url):
    """A URL for a log: without the host, and without the query of the storage's signed URLs."""
    from urllib.parse import urlsplit
    parts = urlsplit(url)
    if parts.query and parts.path.endswith("/v2/runs"):
        return printable(f"{parts.path}?{parts.query}")
    return printable(parts.path)


def without_login(proxy):
    """A proxy's address without the user name and password in it.

    >>> without_login("http://user:p@ss@proxy:8080"), without_login("user:secret@proxy:9")
    ('http://proxy:8080', 'proxy:9')
    """
    scheme, slashes, rest = proxy.rpartition("://")
    host = rest.rpartition("@")[2]
    return scheme + slashes + host


def http_date(text):
    """Seconds since 1970 of a date in a header, or None."""
    from email.utils import mktime_tz, parsedate_tz
    with contextlib.suppress(Exception):    # 3.6 has faults of its own for odd dates
        return mktime_tz(parsedate_tz(text))


def not_the_api(host, status, what):
    return NotTheAPI(f"{host} did not answer as the API does ({status}): {what}",
                     "is --url right? A login page or a proxy may answer in its place", status)


def redirect_target(answer):
    """Where a redirect points to, without what is secret in it."""
    return answer.headers.get("location", "").split("?")[0][:200]


def retry_after(answer):
    """Seconds that the server asks to wait, or None. At most an hour."""
    text = answer.headers.get("retry-after", "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return min(int(text), MAX_DELAY)
    until = http_date(text)
    if until is None:
        return None
    now = http_date(answer.headers.get("date")) or time.time()
    return min(max(until - now, 0), MAX_DELAY)


def delay(tries, unit, asked=None):
    """Seconds to wait after so many tries: random, so that many stations do not come at once.

    Up to unit × 2^tries, or from `asked` on if the server asks for a time; at most an hour.
    """
    import random
    doubled = 2 ** min(tries, 12)
    if asked is not None:
        return min(MAX_DELAY, asked + random.uniform(0, max(asked, doubled)))
    return random.uniform(0, min(MAX_DELAY, unit * doubled))


def read_answer(answer, host, keys=()):
    """The JSON object of an answer, or the error that it tells. `keys`: of texts it must hold."""
    status = answer.status
    if 300 <= status < 400:
        raise not_the_api(host, status, f"a redirect to {redirect_target(answer)}, not followed")
    content_type_given = answer.headers.get("content-type", "")
    kind = content_type_given.partition(";")[0].strip().lower()
    found = None
    if kind == "application/json" or kind.endswith("+json"):
        with contextlib.suppress(ValueError):
            found = load_json(answer.data)
    if not isinstance(found, dict):
        found = {}
    if status >= 300:
        raise error_of(answer, found, host, kind)
    texts = [found.get(key) for key in keys]
    has_texts = all(isinstance(text, str) and text for text in texts)
    if found and has_texts:
        return found
    beginning = answer.data[:60].decode("utf-8", "replace")
    what = f"{kind or 'no type'}, {beginning!r}" if beginning else "empty"
    raise not_the_api(host, status, what)


BELIEVED = (408, 413, 425, 429)     # by their status alone: load balancers send no JSON


def error_of(answer, found, host, kind):
    """The error that an answer of status 4xx or 5xx tells. `found`: the JSON object in it."""
    status = answer.status
    reason = found.get("message") or found.get("error_description") or found.get("error")
    if not reason and status == 414:
        reason = "the address is too long: ask for fewer values at a time"
    believed = status in BELIEVED or status >= 500
    if not reason and not believed:
        return not_the_api(host, status, f"an error of type {kind or 'unknown'}")
    if status >= 500 or believed and status != 413:
        error_type, hint = Unavailable, None
    elif status == 401:
        error_type, hint = AccessDenied, "check the key, and that --url is the right server"
    elif status == 403:
        error_type, hint = AccessDenied, ("a station key reaches the procedures that are linked "
                                          "to its station")
    elif status == 404:
        error_type, hint = NotFound, None
    elif status == 413:
        error_type, hint = Refused, "send less in one run, or ask for a higher limit"
        reason = reason or "the request is too large"
    else:
        error_type, hint = Refused, None
    reason = printable(reason or "no reason given", 500)
    code = found.get("code") if isinstance(found.get("code"), str) else None
    issues = [issue_text(issue) for issue in only_dicts(found.get("issues"))]
    error = error_type(f"the server answered {status}: {reason}", hint, status, code, issues,
                       reason)
    error.retry_after = retry_after(answer)
    if is_about_sub_unit(error):
        error.hint = "a sub-unit needs a run of its own first: create that, then send this again"
    elif is_about_procedure(error):
        error.hint = f"{PROG} ls --columns procedure.name,procedure.id shows those with runs"
    return error


def is_about_sub_unit(error):
    """Whether the server says that a sub-unit is not there: its run may come later."""
    reasons = " ".join([error.message] + error.issues)
    return error.status in (400, 404) and bool(re.search("(?i)sub.?unit", reasons))


def is_about_procedure(error):
    """Whether the server says that there is no such procedure."""
    reasons = " ".join([error.message] + error.issues)
    return error.status in (400, 404) and bool(re.search("(?i)procedure(_| with )id", reasons))


def issue_text(issue):
    """path: message, of a problem that the server found."""
    path = issue.get("path") if isinstance(issue.get("path"), list) else []
    where = ""
    for part in path:
        where += f"[{part}]" if isinstance(part, int) else f".{part}"
    message = str(issue.get("message"))
    return f"{where.lstrip('.')}: {message}" if where else message


# ---- files ---------------------------------------------------------------------------------------

class OpenQueues:
    """The queue files that this process has open: how often, by (device, inode).

    A second descriptor of such a file would, when it is closed, drop the locks of the whole
    process.
    """

    def __init__(self):
        self.pid = os.getpid()
        self.lock = _thread.allocate_lock()
        self.counts = collections.Counter()


open_queues = OpenQueues()


def queues_of_this_process():
    """The OpenQueues; after a fork new ones, as another thread may have held the lock."""
    global open_queues
    if open_queues.pid != os.getpid():
        open_queues = OpenQueues()
    return open_queues


def is_open_queue(path):
    """Whether a file is a queue that this process has open."""
    state = os.stat(path)
    key = (state.st_dev, state.st_ino)
    return queues_of_this_process().counts[key] > 0


class LocalFile:
    """A regular file that is to be attached, with the bytes that it has now.

    A file that grows meanwhile (a log) goes up with the size it had at the start. BadInput if it
    cannot be read or is no regular file; `name` is its own unless given.
    """
    needs_bytes = False     # the same name and size will do where the bytes cannot be had

    def __init__(self, path, name=None):
        self.path = path
        own_name = os.fsencode(os.path.basename(path))
        self.name = name or own_name.decode("utf-8", "replace")
        self.upload_id = None
        self.done = False       # whether its bytes are on the server
        with self.open() as file:
            try:
                self.size = os.fstat(file.fileno()).st_size
                has_this_size = self.is_whole(file)
            except OSError:
                has_this_size = False
        if not has_this_size:
            raise BadInput(f"{path} is a file of the system: its size is not what it holds",
                           "copy its content to a file, and attach that")

    def is_whole(self, file):
        """Whether a file has as many bytes as the system says; those in /proc and /sys have not."""
        if not self.size:
            return not file.read(1)
        file.seek(self.size - 1)
        return bool(file.read(1))

    def open(self):
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            if os.path.isdir(self.path):
                raise BadInput(f"{self.path} is a folder", "name the files in it")
            if is_open_queue(self.path):
                raise BadInput(f"{self.path} is a queue that is in use")
            number = os.open(self.path, flags)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            if "," in self.path:
                reason = f"{reason} (several files are separated by spaces)"
            raise BadInput(f"cannot read {self.path}: {reason}",
                           "name a file that this user can read") from None
        if not stat.S_ISREG(os.fstat(number).st_mode):      # a FIFO would block for ever
            os.close(number)
            raise BadInput(f"{self.path} is not a regular file", "name a file")
        return open(number, "rb")

    def blocks(self):
        """The content, in blocks; FileFailed if it is not to be had any more."""
        try:
            with self.open() as file:
                left = self.size
                while left:
                    block = file.read(min(BLOCK, left))
                    if not block:
                        raise self.lost("it became shorter while it was read")
                    left -= len(block)
                    yield block
        except OSError as error:
            raise self.lost(error.strerror) from None
        except BadInput as error:
            raise self.lost(error.message) from None

    def lost(self, reason):
        error = FileFailed(f"cannot read {self.path} to its end: {reason}",
                               "run the command again when nothing changes the file")
        error.retryable = False
        return error

    def sha256(self):
        return sha256_of(self.blocks())

    def save(self):
        """Nothing: what has arrived is seen on the run."""


class MemoryFile(LocalFile):
    """Bytes that are to be attached under a name."""

    def __init__(self, name, data):
        self.path = self.name = name
        self.data = data
        self.upload_id = None
        self.done = False
        self.size = len(data)

    def open(self):
        import io
        return io.BytesIO(self.data)


def path_list(paths):
    """A list of paths; one alone is a list of one."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def content_type(name):
    import mimetypes
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def safe_name(name):
    r"""A file name that stays in its folder on every system.

    >>> safe_name("../a:b.txt"), safe_name("CON"), safe_name("NUL .x"), safe_name("..")
    ('.._a_b.txt', '_CON', '_NUL .x', 'attachment')
    """
    encoding = sys.getfilesystemencoding()
    name = str(name).encode(encoding, "replace").decode(encoding)
    characters = []
    for character in name:
        is_safe = character.isprintable() and character not in '/\\:*?"<>|'
        characters.append(character if is_safe else "_")
    name = "".join(characters)
    name = name.strip(" ").rstrip(". ")
    stem, ending = os.path.splitext(name)
    if len(os.fsencode(name)) > 200:    # file systems take 255 bytes; -2 and the like follow
        ending = cut_bytes(ending, 20)
        name = cut_bytes(stem, 180) + ending
    if re.match(r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\xb9\xb2\xb3]) *(\.|$)", name):
        name = "_" + name
    return name or "attachment"


def cut_bytes(text, most):
    """The longest beginning of a text that takes at most `most` bytes in a file name."""
    while len(os.fsencode(text)) > most:
        text = text[:-1]
    return text


@contextlib.contextmanager
def new_part(path):
    """(the name, the open file) of a new file beside `path`; it is gone at the end.

    It is made with a name that nobody can guess, so that no link planted there is followed.
    """
    part = f"{path}.{os.urandom(8).hex()}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(part, flags, 0o666), "wb") as file:
            yield part, file
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def replace(source, target):
    """os.replace; on Windows it waits until virus scanners leave the target."""
    for number in range(10):
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in (5, 32, 33):
                raise
            if number == 9:
                raise Error(f"cannot replace {target}: another program has it open",
                            "close it there, or write to another file") from None
            time.sleep(min(0.01 * 2 ** number, 0.64))


def save_new(folder, name, write):
    """Makes a file with write(file); a name that is taken gets -2, -3. Returns the path.

    Error where the disk does not take it.
    """
    path = local_path(os.path.join(folder, safe_name(name)))
    stem, ending = os.path.splitext(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with new_part(path) as (part, file):
            write(file)
            file.close()
            for number in range(2, sys.maxsize):
                with contextlib.suppress(FileExistsError):
                    open(path, "xb").close()
                    break
                path = f"{stem}-{number}{ending}"
            replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    return path


def cannot_write(path, error):
    """The Error for an OSError of a file that is being written."""
    return Error(f"cannot write {printable(path)}: {error.strerror or error}",
                 "make room, or check the folder")


# Attaching. One way for create, create-attachment and the queue: POST /v2/attachments, PUT,
# finalize, and at last one PATCH that links all. A file has name, size, blocks(), sha256(), and how
# far it has come: upload_id and done; save() keeps that (the queue) or does nothing.

def attach(client, run_id, files, progress=None):
    """Uploads the files that the run does not have and links them: those that were missing.

    It never drops what others linked. Where a file fails, those that went up are linked all the
    same, and its error is raised. `progress` is called with (file, bytes sent).
    """
    rows = attachments_of(client, run_id)
    failure = bring_up_all(client, rows, files, progress)
    try:
        new = link_new(client, run_id, rows, files)
    except (NotFound, Refused) as error:
        if isinstance(error, Refused) and not is_about_attachments(error):
            raise
        rows = attachments_of(client, run_id)   # raises where the run itself is not there
        forget_uploads(rows, files)
        failure = bring_up_all(client, rows, files, progress)
        new = link_new(client, run_id, rows, files)
    if failure:
        raise failure
    return new


def is_about_attachments(error):
    """Whether the server says that it does not know an upload."""
    return bool(error.issues) and error.issues[0].startswith("attachments")


def bring_up_all(client, rows, files, progress):
    """Makes all files `done` that can be; returns the first error, or None."""
    free_rows = list(rows)      # each row stands for one file
    failure = None
    for file in files:
        try:
            if not file.done:
                bring_up(client, free_rows, file, progress)
        except (Refused, FileFailed) as error:
            failure = failure or error
        except Error as error:
            return failure or error
    return failure


def link_new(client, run_id, rows, files):
    """Links the uploads that are done and that the run does not have: those files."""
    ids = [row["id"] for row in rows]
    new = [file for file in files if file.done and file.upload_id not in ids]
    own = [file.upload_id for file in new]
    if own:
        client.update(run_id, attachments=own)
    # Whether PATCH appends or replaces is not documented.
    if not own or not ids:
        return new
    linked = {row["id"] for row in attachments_of(client, run_id)}
    if not set(ids) <= linked:
        client.update(run_id, attachments=ids + own)
    return new


def forget_uploads(rows, files):
    """Makes files go up again whose uploads the server forgot before they were linked."""
    ids = [row["id"] for row in rows]
    for file in files:
        if file.upload_id not in ids:
            file.upload_id = None
            file.done = False
            file.save()


def attachments_of(client, run_id):
    rows = only_dicts(client.get(run_id).get("attachments"))
    return [row for row in rows if isinstance(row.get("id"), str)]


def bring_up(client, rows, file, progress):
    """Makes one file `done`: it is one of the rows of the run, or goes up now."""
    there = find_attached(client, rows, file)
    if there:
        rows.remove(there)
        file.upload_id = there["id"]
    else:
        upload(client, file, progress)
    file.done = True
    file.save()


def find_attached(client, rows, file):
    """The row of attachments that is this file, or None.

    Its upload's ID tells, else its name, size and bytes. Where the bytes cannot be had, the name
    and the size will do for a local file.
    """
    import hashlib
    for row in rows:
        if row["id"] == file.upload_id:
            return row
        is_alike = row.get("name") == file.name and row.get("size") == file.size
        if not is_alike:
            continue
        if not row.get("download_url"):
            if file.needs_bytes:
                continue
            return row
        digests = []

        def begin():
            digests.append(hashlib.sha256())
            return digests[-1].update
        try:
            fetch(client, row, begin)
        except FileFailed as error:
            if file.needs_bytes and (error.status or 0) in range(400, 500):
                continue        # they are gone there
            raise
        if digests[-1].hexdigest() == file.sha256():
            return row
    return None


def upload(client, file, progress):
    """Brings one file to the storage and finalizes it."""
    if file.upload_id:      # an earlier process came this far: had the bytes arrived?
        with contextlib.suppress(NotFound, Refused):
            client.finalize(file.upload_id)
            return
    for is_last in (False, True):
        made = client.initialize(file.name)
        file.upload_id = made["id"]
        file.save()
        try:
            put(client, made["upload_url"], file, progress)
            client.finalize(file.upload_id)
            return
        except NotFound:        # a login portal took the bytes, or the server forgot the upload
            if is_last:
                raise storage_error(f"it lost the bytes of {file.name}") from None
        except FileFailed as error:     # 4xx: the URL has expired; ask for another, once
            is_expired = 400 <= (error.status or 0) < 500 and not error.retryable
            if is_last or not is_expired:
                raise


def put(client, url, file, progress):
    """PUTs a file to its presigned URL; the key does not go there."""
    until = time.monotonic() + UPLOAD_WINDOW
    headers = {"Content-Type": content_type(file.name), "Content-Length": str(file.size)}

    def content():
        sent = 0
        for block in file.blocks():
            yield block
            sent += len(block)
            if progress:
                progress(file, sent)

    def exchange(budget):
        if time.monotonic() > until:
            raise storage_error("its upload URL has expired", 403)
        body = content if file.size else b""
        return client.transport.exchange("PUT", url, headers, body, budget)
    at_storage(client, url, file.name, file.size, exchange)


class Meter:
    """Passes blocks on, and counts them: a file must have the size that the server says."""

    def __init__(self, name, size, take_block):
        self.name = name
        self.size = size        # None where it is not known
        self.take_block = take_block
        self.received = 0

    def take(self, block):
        self.received += len(block)
        if self.size is not None and self.received > self.size:
            raise wrong_size(self.name, self.size, "more")
        self.take_block(block)

    def require_whole(self):
        if self.size not in (None, self.received):
            raise wrong_size(self.name, self.size, self.received)


def fetch(client, row, begin):
    """Gets an attachment. `begin` gives, for each try, the function that takes its blocks.

    FileFailed where it is larger or smaller than the server says.
    """
    url = row["download_url"]
    name = printable(row.get("name"), 80)
    size = row.get("size")
    if not is_number(size) or not 0 <= size < 1 << 40:
        size = None

    def exchange(budget):
        meter = Meter(name, size, begin())
        headers = {"Accept": "*/*"}
        answer = client.transport.exchange("GET", url, headers, None, budget, meter.take)
        if answer.status == 200:
            meter.require_whole()
        return answer
    at_storage(client, url, name, size or 1 << 30, exchange)


def wrong_size(name, size, received):
    return storage_error(f"{name} has {size} bytes on the server, {received} came; not saved")


def at_storage(client, url, name, size, exchange):
    """exchange(seconds) with the storage, which gives an Answer; FileFailed where it fails."""
    try:
        parts = check_url(url, client.allow_http, "the server gave a URL for it that")
    except ValueError as error:
        reason = first_line(str(error))
        raise storage_error(reason) from None
    budget = 60 + size / SLOWEST_FILE

    def attempt():
        try:
            answer = exchange(budget)
        except FileFailed:
            raise
        except Unavailable as error:
            raise out_of_reach(error) from None
        if answer.status != 200:
            raise storage_refusal(answer, parts.netloc, name, size)
    client.perform(attempt)


def storage_refusal(answer, host, name, size):
    """The error for an answer of the storage that is not 200."""
    if answer.status == 413 or b"EntityTooLarge" in answer.data:
        return Refused(f"the storage does not take {name}: {size_text(size)} is too large "
                       f"({answer.status})", "attach a smaller file, such as a compressed one", 413)
    target = redirect_target(answer)
    where = f", a redirect to {target}" if target else ""
    error = storage_error(f"{host} answered {answer.status}{where}", answer.status)
    error.retry_after = retry_after(answer)
    return error


def out_of_reach(error):
    """The FileFailed for a storage that gave no answer: the API may well be in reach."""
    failure = storage_error(error.message)
    failure.notes = error.notes
    failure.retryable = error.retryable
    failure.reused = error.reused
    failure.is_network = True
    return failure


def storage_error(reason, status=None):
    error = FileFailed(f"the storage of the files: {reason}",
                       "run the same command again later: only what is missing goes up", status)
    error.retryable = status in (408, 425, 429) or (status or 0) >= 500
    return error


def download(client, row, folder):
    """Saves an attachment under a safe name, never over a file that exists. Returns the path."""
    def write(file):
        def begin():
            file.seek(0)
            file.truncate()
            return lambda block: write_block(file, block)
        fetch(client, row, begin)
    return save_new(folder, row.get("name"), write)


def write_block(file, block):
    """Writes to a file; what fails is the disk's fault, not the network's."""
    try:
        file.write(block)
    except OSError as error:
        raise cannot_write(file.name, error) from None


# ---- client --------------------------------------------------------------------------------------

class Client:
    """The operations on runs, with the names and arguments of the official SDK.

        client = Client()       # server, key and CA as on the command line
        client.create(outcome="PASS", procedure_id="proc_abc", serial_number="SN-1",
                      started_at=datetime, ended_at=datetime)  ->  {"id": "..."}

    Times are datetimes (local if naive) or text, JSON is plain dicts and lists, answers are the
    server's own dicts. Raises BadInput, AccessDenied, NotFound, Refused or Unavailable. `timeout`:
    seconds for each wait on the network; `retries`: tries after the first. `notify` is called with
    a line of text for each wait, `trace` with one for each request. Not for several threads at a
    time; after a fork it opens connections of its own.
    """

    def __init__(self, url: str = None, api_key: str = None, ca_cert: str = None,
                 timeout: float = 30, retries: int = 3, allow_http: bool = False,
                 source: str = "api_key", notify=None, trace=None, transport=None):
        self.named = {"url": url, "api_key": api_key, "source": source, "allow_http": allow_http}
        self.allow_http = allow_http
        self.retries = retries
        self.notify = notify or ignore
        self.trace = trace
        self.transport = transport or Transport(
            timeout, ca_cert or environment("TOFUPILOT_CA_CERT"), trace)
        self.found_login = None
        self.waits = None       # seconds waited, where all requests share one limit
        self.ref_is_known = None    # whether the server knows client_run_ref, once it was asked

    def close(self) -> None:
        """Closes the kept connections."""
        self.transport.close()

    def clone(self):
        """A Client for another thread: the same login, connections of its own."""
        login = self.login      # this may find the CA, too
        transport = Transport(self.transport.timeout, self.transport.ca_cert, self.trace)
        other = Client(retries=self.retries, allow_http=self.allow_http, notify=self.notify,
                       trace=self.trace, transport=transport)
        other.found_login = login
        other.transport.secrets = self.transport.secrets
        other.waits = self.waits
        other.ref_is_known = self.ref_is_known
        return other

    @property
    def login(self):
        """The Login, looked up once."""
        if self.found_login is None:
            login = find_login(warn=self.notify, **self.named)
            self.transport.ca_cert = self.transport.ca_cert or login.ca_cert
            if login.key:
                self.transport.hide(login.key, KEY_WORD)
            self.found_login = login
        return self.found_login

    def list(self, **filters) -> dict:
        """One page: {"data": [run, ...], "meta": {"has_more", "next_cursor"}}."""
        page = self.call("list", filters)
        read_page(page, filters.get("cursor"))
        return page

    def iterate(self, limit: int = None, page_size: int = 100, **filters):
        """Runs, page after page; all of them, or `limit`."""
        for rows, _ in self.pages(limit, page_size, **filters):
            yield from rows

    def pages(self, limit: int = None, page_size: int = 100, **filters):
        """(rows, meta) of each page. A run that slipped to the next page is not given twice.

        An error has `cursor`: where to go on.
        """
        filters = check("list", filters)
        cursor = filters.pop("cursor", None)
        if limit == 0:
            return
        recent = collections.deque(maxlen=10)
        with contextlib.closing(PageReader(self, filters, page_size)) as reader:
            while True:
                try:
                    rows, meta = reader.read(cursor, limit)
                except Error as error:
                    error.cursor = cursor
                    raise
                known = set().union(*recent)
                fresh = [row for row in rows if str(row.get("id", id(row))) not in known]
                recent.append({str(row.get("id")) for row in rows})
                yield fresh, meta
                cursor = meta.get("next_cursor")
                if limit is not None:
                    limit = max(limit - len(fresh), 0)      # a server may give more than asked
                if not meta.get("has_more") or limit == 0:
                    return

    def get(self, id: str) -> dict:
        """The whole run."""
        return self.call("get", {"id": id})

    def create(self, **fields) -> dict:
        """Creates a run once: {"id"}. The same content again gives the same run."""
        return self.send_create(with_ref(check("create", fields)))

    def attach(self, run_id: str, paths) -> list:
        """Uploads files and links them to a run: [{"id", "name"}].

        A file that the run has already, by its name, size and bytes, does not go up again.
        """
        files = [LocalFile(path) for path in path_list(paths)]
        attach(self, run_id, files)
        return [{"id": file.upload_id, "name": file.name} for file in files]

    def update(self, id: str, **attachments) -> dict:
        """Links uploads (attachments=[ID, ...]) to a run: {"id"}."""
        return self.call("update", dict(attachments, id=id))

    def update_metadata(self, id: str, metadata: dict) -> dict:
        """Sets keys, deletes those that are null, keeps the others: {"id"}."""
        return self.call("update_metadata", {"id": id, "metadata": metadata})

    def create_attachment(self, id: str, name: str) -> dict:
        """An empty attachment on the run, and where to PUT its bytes: {"id", "upload_url"}."""
        return self.call("create_attachment", {"id": id, "name": name})

    def initialize(self, name: str) -> dict:
        """An upload that no run has yet: {"id", "upload_url"}."""
        return self.call("initialize", {"name": name})

    def finalize(self, id: str) -> dict:
        """Tells the server that the bytes are there: {"url"}."""
        return self.call("finalize", {"id": id})

    def whoami(self) -> dict:
        """Whose key this is. NotFound where the server is older than API 2.22."""
        return self.call("whoami", {})

    def delete(self, ids) -> dict:
        """Deletes runs, 100 a request: {"id": [those that are gone]}. NotFound if none was."""
        ids = check("delete", {"ids": ids})["ids"]
        gone, missing = [], None
        for start in range(0, len(ids), 100):
            part = ids[start:start + 100]
            try:
                answer = self.call("delete", {"ids": part})
                if not isinstance(answer.get("id"), list):
                    raise not_the_api(self.host, 200, "no list of IDs")
                gone += answer["id"]
            except NotFound as error:
                if error.status != 404:
                    raise error.with_note(deleted_text(gone, ids))
                missing = error
                if error.after_unanswered_try:
                    gone += part
            except Error as error:
                if gone:
                    error.with_note(deleted_text(gone, ids))
                if error.status == 403:
                    error.hint = "a station key deletes nothing: use a user key"
                raise
        if missing and not gone:
            missing.hint = (f"copy whole IDs: {PROG} ls --serial-numbers SN-0001 -q prints those "
                            "of a unit;\na run that is deleted already is gone")
            raise missing
        return {"id": gone}

    @property
    def host(self):
        return self.login.url.partition("://")[2]

    def call(self, operation, values):
        """The values checked, sent and answered."""
        wire = check(operation, values)
        try:
            return self.perform(lambda: self.send(operation, wire),
                                repeatable=operation != "create_attachment")
        except (NotFound, Refused) as error:
            not_found = no_such_id(operation, wire, error)
            if not_found is None:
                raise
            raise not_found from None

    def send(self, name, wire, before_send=None):
        """One exchange with the API, for an operation: the JSON object of its answer."""
        from urllib.parse import quote
        operation = OPERATIONS[name]
        rest = dict(wire)
        url = f"{self.login.url}/api{operation.path}"
        if "{id}" in operation.path:
            url = url.replace("{id}", quote(rest.pop("id"), safe=""))
        content = None
        if name == "finalize":
            pass        # a POST without a body
        elif operation.method in ("POST", "PATCH"):
            content = dump_json(rest).encode("ascii")
        elif rest:
            url += "?" + query_text(rest)
        headers = {"Accept": "application/json",
                   "User-Agent": f"tofupilot_runs/{__version__} Python/{sys.version.split()[0]}"}
        if self.login.key:
            headers["Authorization"] = "Bearer " + self.login.key
        elif not self.transport.is_dry_run:
            raise no_key()
        if content:     # http.client adds its length
            headers["Content-Type"] = "application/json"
        answer = self.transport.exchange(operation.method, url, headers, content,
                                         before_send=before_send)
        try:
            return read_answer(answer, self.host, operation.answer_keys)
        except AccessDenied as error:
            if error.status == 401:
                error.message = (f"the server refused the API key ending ...{self.login.key[-4:]} "
                                 f"(401): {error.reason}")
                error.with_note(f"key from: {self.login.source}   server: {self.login.url}")
            raise
        except Refused as error:
            if error.status == 413 and content:
                error.with_note(f"this request has {size_text(len(content))}")
            raise

    def perform(self, attempt, repeatable=True, before_resend=None, retries=None):
        """attempt() until it succeeds, fails for good, or the limit of waits is reached.

        `repeatable`: whether it may be sent once more after it may have arrived. `before_resend` is
        called before that: what it returns, if not None, is the result, and nothing is sent again.
        """
        tries = Tries(self, retries, repeatable)
        while True:
            try:
                return attempt()
            except NotFound as error:
                error.after_unanswered_try = tries.maybe_sent and tries.count > 0
                raise
            except Unavailable as error:
                tries.wait_after(error)     # raises it where no other try is allowed
            if before_resend is not None and tries.maybe_sent:
                found = before_resend()
                if found is not None:
                    return found

    def knows_ref(self):
        """Whether the server knows client_run_ref, so that a create may simply be sent again.

        That came with API 2.19; a server that answers whoami (API 2.22) surely knows it. Asked
        once. Raises where the question gets no answer.
        """
        if self.ref_is_known is None:
            try:
                self.perform(lambda: self.send("whoami", {}), retries=max(self.retries, 1))
                self.ref_is_known = True
            except NotFound:
                self.ref_is_known = False
            except Error as error:
                if error.status == 401 or isinstance(error, Unavailable):
                    raise
                raise Unavailable("the server does not say which version it is: " + error.message,
                                  status=error.status) from None
        return self.ref_is_known

    def send_create(self, body, first_try=None, known_run_ids=set, before_send=None):
        """Creates the run of a body that has its client_run_ref: {"id"}.

        `first_try`: when (time.time()) an earlier attempt may have arrived, None for never.
        `known_run_ids` gives the IDs of runs that are known to be others; `before_send` is called
        right before the first byte goes out.
        """
        since = first_try or time.time()
        may_exist = False       # a try may have arrived that got no answer

        def existing_run():
            nonlocal may_exist
            may_exist = True
            try:
                if self.knows_ref():
                    return None
                return self.find_existing_run(body, since, known_run_ids)
            except Error as error:
                raise in_doubt(error, "the server could not be asked")
        if first_try:
            existing = existing_run()
            if existing is not None:
                return existing
        try:
            return self.perform(lambda: self.send("create", body, before_send),
                                before_resend=existing_run)
        except AccessDenied as error:
            if may_exist:
                in_doubt(error, "an earlier try got no answer")
            raise
        except (NotFound, Refused) as error:
            if may_exist:
                self.doubt_refusal(error, body, known_run_ids())
            raise
        except Unavailable as error:
            if error.maybe_sent and error.status is None and not error.tells_doubt:
                error.with_note("the run may be stored or not")
            raise

    def doubt_refusal(self, error, body, others):
        """Says in a refusal that an earlier try may have made a run, where one like it is there.

        A refusal speaks of its own try alone: a proxy knows nothing of one that arrived before.
        `others`: the IDs of runs that are known to be others.
        """
        try:
            for row in self.rows_like(body):
                if has_times_of(row, body) and row.get("id") not in others:
                    in_doubt(error, "an earlier try got no answer, and a run of the same unit and "
                             f"times is there: {row.get('id')}")
                    return
        except Error as failure:
            raise in_doubt(failure, "the server could not be asked") from None

    def find_existing_run(self, body, since, known_run_ids):
        """{"id"} of the run that an unanswered create of this body has made, or None.

        For servers that do not know client_run_ref. All that a row shows must agree, and the run
        must have been stored after the first try (the server's clock, 10 minutes of slack).
        """
        for row in self.rows_like(body):
            theirs, ours = self.transport.server_clock or (time.time(), time.time())
            passed = ours - since
            earliest = theirs - passed - CLOCK_SLACK
            if passed < 0:      # our clock was set back
                earliest = 0
            stored_at = epoch(row.get("created_at")) or theirs
            if stored_at < earliest or row.get("id") in known_run_ids():
                continue
            if is_same_run(row, body):
                return {"id": row["id"]}
        return None

    def rows_like(self, body):
        """The rows of a list of the runs of this body's unit and procedure at its start."""
        if None in (epoch(body.get("started_at")), epoch(body.get("ended_at"))):
            return      # no server takes such a run
        begin, _ = utc_parts(body["started_at"])
        pages = self.pages(serial_numbers=[body.get("serial_number")],
                           procedure_ids=[body.get("procedure_id")],
                           started_after=shift_time(begin, -1).isoformat(),
                           started_before=shift_time(begin, 2).isoformat(), include_metadata=True)
        try:
            for rows, _ in pages:
                yield from rows
        except (BadInput, Refused) as error:
            reason = "".join(error.issues[:1])
            if not re.match("procedure_ids|serial_numbers", reason):
                raise       # else there can be no run of such a procedure or unit


def in_doubt(error, reason):
    """The error, once it says that the run may be on the server, and why that is not known."""
    error.maybe_sent = error.tells_doubt = True
    return error.with_note(f"the run may be stored or not: {reason}")


class Tries:
    """The tries of one request: how many failed, and whether one of them may have arrived.

    `limit`: how many may follow the first. None: the client's `retries`, as they are when a try
    has failed.
    """

    def __init__(self, client, limit, repeatable):
        self.client = client
        self.limit = limit
        self.repeatable = repeatable
        self.waits = client.waits
        if self.waits is None:      # then the limit of waits is each request's own
            self.waits = []
        self.started = time.monotonic()
        self.count = 0
        self.maybe_sent = False
        self.had_free_retry = False

    def wait_after(self, error):
        """Waits until another try may be made; raises the error where there is none."""
        if error.maybe_sent:
            self.maybe_sent = True
        if error.reused and self.repeatable and not self.had_free_retry:
            self.had_free_retry = True      # a kept connection that had died costs no try
            return
        self.count += 1
        seconds = delay(self.count, 1, error.retry_after)
        if not self.can_retry(error, seconds):
            self.give_up(error)
        self.client.notify(f"{error.message}; next try in {seconds:.1f} s")
        time.sleep(seconds)
        self.waits.append(seconds)

    def can_retry(self, error, seconds):
        if not error.retryable:
            return False
        if error.maybe_sent and not self.repeatable:
            return False
        limit = self.client.retries if self.limit is None else self.limit
        if self.count > limit:
            return False
        return sum(self.waits) + seconds <= MAX_TOTAL_WAIT

    def give_up(self, error):
        if self.count > 1:
            took = time.monotonic() - self.started
            error.message += f" ({self.count} tries in {took:.0f} s)"
        error.maybe_sent = self.maybe_sent
        raise error


def deleted_text(gone, ids):
    return f"{len(gone)} of {len(ids)} runs were deleted"


def ignore(text):
    """For those who want no notes."""


def query_text(values):
    """The values as the query of a URL: lists repeat their key, all but text is JSON."""
    from urllib.parse import urlencode
    pairs = []
    for key, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            pairs.append((key, item if isinstance(item, str) else dump_json(item)))
    return urlencode(pairs)


def no_such_id(operation, wire, error):
    """The NotFound that names the ID, for an error that says that there is no such run or upload.

    None for any other error. The server looks at the form of an ID first: a 400 about it alone
    means that it does not exist either.
    """
    wrong_form = None
    if error.status == 400 and error.issues:
        wrong_form = re.match(r"ids?(?:\[(\d+)\])?: ", error.issues[0])
    id = wire.get("id")
    if wrong_form and operation in ("delete", "list"):
        number = int(wrong_form.group(1) or 0)
        id = dict(enumerate(wire["ids"])).get(number)
    if not id or not (wrong_form or isinstance(error, NotFound)):
        return None
    kind = "upload" if operation == "finalize" else "run"
    shown = printable(id, 80)
    found = NotFound(f"no {kind} {shown} ({error.status}): {error.reason}",
                     "copy the whole ID; ls -q prints bare IDs", error.status, error.code,
                     error.issues, error.reason)
    if names_a_file(id):
        found.hint = f"did you mean @{shown}? That reads the IDs in the file"
    elif "," in id:
        found.with_note("several IDs are separated by spaces, not commas")
    elif len(id) != 36:
        found.with_note(f"this ID has {counted(len(id), 'character')}, IDs have 36")
        how = f"get --serial-number {shown} shows its newest run"
        if operation != "get":
            how = f"ls --serial-numbers {shown} -q prints the IDs of its runs"
        found.hint += f"\nis it a serial number? {PROG} {how}"
    found.after_unanswered_try = getattr(error, "after_unanswered_try", False)
    return found


class PageReader:
    """Reads the pages of a list; once one says that more exist, up to four at the same time.

    A cursor is a number of rows, so the pages behind the next one can be asked for ahead, each with
    a Client and in a thread of its own. Such a page counts only if the page before it names its
    cursor.
    """

    def __init__(self, client, filters, page_size):
        self.client = client
        self.filters = filters
        self.page_size = page_size
        self.is_first = True
        self.clones = []    # Clients for the pages ahead
        self.idle = []      # those of them without a request under way
        self.ahead = {}     # cursor: function that waits for the answer
        self.was_misled = False     # whether a page named another cursor than expected
        self.is_closed = False

    def read(self, cursor, limit):
        """(rows, meta) of the page at a cursor; `limit`: rows wanted from there on, or None."""
        if self.ahead and cursor not in self.ahead:     # pages of this server are shorter
            self.ahead.clear()
            self.was_misled = True
        if not self.is_first and not self.is_slow():
            with contextlib.suppress(RuntimeError):     # no thread can be had
                self.ask_ahead(cursor, limit)
        self.is_first = False
        wait = self.ahead.pop(cursor, None)
        if wait:
            answer = wait()
        else:
            answer = self.client.call("list", self.values(cursor, limit))
        return read_page(answer, cursor)

    def is_slow(self):
        """Whether only one page at a time is asked for.

        The server has too much to do; or its cursors cannot be guessed: then each guess would be a
        request, and a thread, for nothing.
        """
        if self.client.transport.is_dry_run or self.was_misled:
            return True
        return any(client.transport.was_overloaded for client in [self.client] + self.clones)

    def values(self, cursor, limit):
        values = dict(self.filters, limit=min(self.page_size, limit or self.page_size))
        if cursor is not None:
            values["cursor"] = cursor
        return values

    def ask_ahead(self, cursor, limit):
        """Asks for the page at a cursor and those behind it, as far as the limit can need them."""
        for number in range(PAGES_AHEAD):
            skipped = number * self.page_size
            if limit is not None and skipped >= limit:
                return
            if cursor + skipped not in self.ahead:
                left = None if limit is None else limit - skipped
                values = self.values(cursor + skipped, left)
                self.ahead[cursor + skipped] = start_thread(self.ask, values)

    def ask(self, values):
        """The answer for one page, or None if nobody reads it. Runs in a thread of its own."""
        try:
            client = self.idle.pop()
        except IndexError:
            client = self.client.clone()
            self.clones.append(client)
        try:
            return None if self.is_closed else client.call("list", values)
        finally:
            self.idle.append(client)
            if self.is_closed:
                client.close()

    def close(self):
        """Nobody reads what is still asked for: it is not tried again, and no failure is told."""
        self.is_closed = True
        for client in self.clones[:]:
            client.retries = 0
        for client in self.idle[:]:
            client.close()


def read_page(answer, cursor):
    """(rows, meta) of a page that is of the right form and leads on."""
    rows, meta = answer.get("data"), answer.get("meta")
    rows_are_dicts = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not rows_are_dicts or not isinstance(meta, dict):
        raise Unavailable("the server's page of runs is not {data, meta}", "is --url right?")
    following = meta.get("next_cursor")
    leads_on = isinstance(following, int) and following > (cursor or 0)
    if meta.get("has_more") and not leads_on:
        raise Unavailable("the server says that more runs exist, but its cursor does not advance: "
                          f"{printable(following, 40)}", "tell the server's administrator")
    return rows, meta


SHOWN_AT = {"serial_number": "unit.serial_number", "procedure_id": "procedure.id",
            "procedure_version": "procedure.version.tag", "part_number": "unit.part.number",
            "revision_number": "unit.part.revision.number", "batch_number": "unit.batch.number",
            "outcome": "outcome", "docstring": "docstring", "execution_id": "execution_id",
            "slot_key": "slot_key", "slot_name": "slot_name"}


def has_times_of(row, body):
    """Whether a row of a list has the start and the end of a body."""
    for field in ("started_at", "ended_at"):     # the server keeps milliseconds
        shown = epoch(row.get(field)) or 0
        if abs(shown - epoch(body[field])) > 0.0011:    # and a float is not exact
            return False
    return True


def is_same_run(row, body):
    """Whether a row of a list can be the run that a create of this body made."""
    for field, path in SHOWN_AT.items():
        sent = lower_text(body.get(field))
        shown = lower_text(get_path(row, path))
        made_by_server = not sent and path.startswith("unit.")
        if sent != shown and not made_by_server:
            return False
    if not has_times_of(row, body):
        return False
    metadata = row.get("metadata") or {}
    if metadata != body.get("metadata", {}):
        return False
    sent = lower_text(body.get("operated_by"))
    name = lower_text(get_path(row, "operated_by.name"))
    email = lower_text(get_path(row, "operated_by.email"))
    if sent:
        return sent in (name, email)
    return not name and not email


def lower_text(value):
    """A value as text in lower case; none is an empty text."""
    return "" if value is None else str(value).lower()


# ---- queue ---------------------------------------------------------------------------------------
#
# One SQLite file holds the runs that wait for the network, their files, and how far each has come.
# The states of an entry and all moves between them:
#
#     storing -> waiting   store: its files are in; before that it cannot be sent
#     storing -> parked    store: the checks refuse it
#     waiting -> sent      send: the run and all its files are on the server; a receipt for 30 days
#     waiting -> parked    send: the server refused it for good, or it is damaged
#     parked  -> waiting   retry, fix
#     waiting -> parked    fix: the checks refuse the new content
#     waiting -> moving    move, first commit: another file may have it, it is not sendable here
#     moving  -> moved     move, last commit: the other file has it; a receipt for 30 days
#     sent    -> waiting   store: the same create again, with more files
#     moving  -> waiting   move: it failed, and this entry surely did not arrive there
#     moving  -> parked    move: the entry is damaged
#     moved   -> waiting   move: it came back from another file
#     (new)   -> fixed     fix: the old ref of an entry that got a new one; target names that
#
# Exactly once: tried_at and origin are committed before the first byte goes out. Where they stand
# without a run_id, the run may be on the server.
#
# The columns of an entry whose names do not say it all:
#
#     ref             the client_run_ref, given by hand or made from the content
#     content         the ref that the body alone would have: its checksum
#     units           the serial numbers in it, its own and its sub-units', in lower case
#     server          the server that was named when it was stored; it goes to no other
#     origin          the server that it was begun at
#     tried_at        when it was first sent and may have arrived
#     failed_at       when it failed last; status: the HTTP status then
#     suspect         how often it failed while others were sent, or at the storage
#     target          of a move: the identity and path of the other file; of "fixed": the new ref
#     hop, came       the token of the move that takes it away, and of the one that brought it here
#     ended_at        when it became a receipt
#
# The table received has the tokens of all moves that arrived: none arrives twice.

APPLICATION_ID = 0x54465251     # "TFRQ" in the file's header
SCHEMA_VERSION = 1
RECEIPT_DAYS = 30           # how long a receipt answers the same create
TOKEN_DAYS = 400            # how long a move that arrived is remembered
LOCK_WAIT = 30              # seconds to wait for another process that writes
SMALL = 1 << 20             # bytes of files that are stored in one transaction
MOST_IN_ONE_COMMIT = 64 << 20
WINDOW = 200                # entries that are read from the file at a time
SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE identity (id TEXT);
INSERT INTO identity VALUES (lower(hex(randomblob(16))));
CREATE TABLE entry (id INTEGER PRIMARY KEY AUTOINCREMENT, ref TEXT, state TEXT, body TEXT,
    units TEXT, outcome TEXT, serial_number TEXT, procedure_id TEXT, stored_at REAL,
    tries INTEGER DEFAULT 0, tried_at REAL, failed_at REAL, next_try_at REAL DEFAULT 0,
    error TEXT, exit_code INTEGER, content TEXT, origin TEXT, run_id TEXT, target TEXT,
    hop TEXT, came TEXT, ended_at REAL);        -- and ADDED_COLUMNS
CREATE INDEX entry_by_ref ON entry (ref);
CREATE INDEX entry_by_state ON entry (state, id);
CREATE TABLE file (id INTEGER PRIMARY KEY AUTOINCREMENT, entry INTEGER, name TEXT, size INTEGER,
    sha256 TEXT, upload_id TEXT, done INTEGER DEFAULT 0);
CREATE INDEX file_by_entry ON file (entry);
CREATE TABLE chunk (file INTEGER, part INTEGER, data BLOB, PRIMARY KEY (file, part))"""
ADDED_COLUMNS = {"server": "TEXT", "suspect": "INTEGER DEFAULT 0", "status": "INTEGER",
                 "left_out": "TEXT"}    # in 1.1.0
RECEIVED = "CREATE TABLE IF NOT EXISTS received (token TEXT PRIMARY KEY, at REAL)"    # since 1.1.0
# States, as a tuple of words that stands in SQL as it is.
OPEN = ("waiting", "parked")            # what fix and retry take
ENDED = ("sent", "moved", "fixed")      # receipts


class Removed(Error):
    """The entry is not there any more, or not as it was: another command was quicker."""

    def __init__(self):
        super().__init__("the entry was removed or corrected meanwhile")


class Queue:
    """The queue file at a path; makes it if it is missing, unless `must_exist` (NotFound).

    `read_only`: nothing will be changed, so a file that cannot be written will do.
    """

    def __init__(self, path, must_exist=False, read_only=False):
        self.path = os.path.abspath(path)
        self.real_path = os.path.realpath(self.path)    # names the lock, whatever link leads here
        self.connection = None
        self.key = None
        if must_exist and not os.path.exists(self.path):
            raise NotFound(f"there is no queue file {printable(self.path)}",
                           "check the path and the user: the default one is each user's own")
        self.sqlite3 = import_sqlite(self.path)
        try:
            opened = queues_of_this_process()
            with opened.lock:
                key = self.look_at_file(read_only, opened.counts)
                self.key = key
                opened.counts[key] += 1
            self.open(read_only)
        except OSError as error:
            self.close()
            raise self.unusable(error.strerror) from None
        except BaseException:
            self.close()
            raise

    def look_at_file(self, read_only, counts):
        """The (device, inode) of the file. Makes a missing one; raises where it is no queue."""
        if not read_only:
            with contextlib.suppress(BadInput, FileExistsError):    # no home; it is there already
                if os.path.dirname(self.path) == home():
                    os.makedirs(home(), 0o700)
        if not read_only and not os.path.exists(self.real_path):
            with contextlib.suppress(FileExistsError):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                os.close(os.open(self.real_path, flags, 0o600))
        info = os.stat(self.real_path)
        if stat.S_ISDIR(info.st_mode):
            raise self.unusable("it is a folder", "name a file in it, such as --queue "
                                + os.path.join(self.path, "line3.queue"))
        if not stat.S_ISREG(info.st_mode):
            raise self.unusable("it is not a regular file")
        if info.st_nlink > 1:
            raise self.unusable("it has a second name (a hard link), so its lock would not hold",
                                "remove the other name")
        if not read_only and not os.access(self.real_path, os.W_OK):
            raise self.unusable("this user cannot write it")
        key = (info.st_dev, info.st_ino)
        if not counts[key]:     # else closing it would drop the locks of this process
            self.look_at_head()
        return key

    def look_at_head(self):
        """Raises where the file is no queue file; an empty one becomes one.

        Looked at before SQLite touches it: that would change a file of another program that was
        not closed properly.
        """
        with open(self.real_path, "rb", buffering=0) as file:
            head = file.read(100)
        is_sqlite = head[:16] == b"SQLite format 3\0"
        if not head:
            return
        # Only now: on Windows a look opens the journal, and one that is deleted meanwhile stays
        # until it is closed. SQLite fails then, or takes it for hot and undoes a commit (Wine).
        if head[:16] == bytes(16) and os.path.exists(self.real_path + "-journal"):
            return
        schema_cookie, user_version, application_id = head[40:44], head[60:64], head[68:72]
        if is_sqlite and not any(schema_cookie + user_version + application_id):
            return      # auto_vacuum was set, but no table was ever made
        if not is_sqlite or application_id != APPLICATION_ID.to_bytes(4, "big"):
            raise self.unusable("it is not a queue file", "name another file")
        if int.from_bytes(user_version, "big") > SCHEMA_VERSION:
            raise self.unusable(f"a newer version of {PROG} made it",
                                "use that version, or another queue file")

    def open(self, read_only):
        """Connects, and makes the tables that are missing."""
        # Python 3.6 takes the path as UTF-8, whatever the locale says.
        self.name = self.real_path
        if sys.version_info < (3, 7):
            self.name = os.fsencode(self.real_path).decode()
        try:
            self.connection = self.sqlite3.connect(self.name, timeout=0.1, isolation_level=None,
                                                   check_same_thread=False)
        except self.sqlite3.Error as error:
            raise self.unusable(error) from None
        self.connection.row_factory = self.sqlite3.Row
        # A byte that was damaged must not stop what is behind it: the checksums find it.
        self.connection.text_factory = lambda data: data.decode("utf-8", "replace")
        is_modern = self.sqlite3.sqlite_version_info >= (3, 12)     # before, EXTRA means NORMAL
        self.sql("PRAGMA synchronous = " + ("EXTRA" if is_modern else "FULL"))
        self.sql("PRAGMA secure_delete = OFF")
        self.sql("PRAGMA cache_size = -256")    # chunks are read once: 2 MB would be for nothing
        self.columns = self.column_names()
        if not self.columns and not read_only:      # once there are tables it is ignored
            self.sql("PRAGMA auto_vacuum = INCREMENTAL")
        if not read_only and self.missing_schema():
            with self.transaction():
                # A pragma alone would tell what this connection knew before the lock.
                self.sql("SELECT name FROM sqlite_master LIMIT 1")
                self.columns = self.column_names()
                for statement in self.missing_schema():
                    self.sql(statement)
                self.columns = self.column_names()
        if not self.columns:
            raise self.unusable("it has no tables yet")

    @property
    def identity(self):
        """What tells this file from all others, under whatever path."""
        return self.sql("SELECT id FROM identity")[0]["id"]

    def column_names(self):
        return [row["name"] for row in self.sql("PRAGMA table_info(entry)")]

    def missing_schema(self):
        """The statements that make this a queue file of this version."""
        added = [name for name in ADDED_COLUMNS if name not in self.columns]
        statements = []
        if not self.columns:
            statements += SCHEMA.split(";")
        if added:
            statements.append(RECEIVED)
        for name in added:
            statements.append(f"ALTER TABLE entry ADD COLUMN {name} {ADDED_COLUMNS[name]}")
        return statements

    def unusable(self, reason, hint="check the path, its rights and the room on the disk"):
        return queue_unusable(self.path, reason, hint)

    def close(self):
        if self.connection:
            self.connection.close()
            self.connection = None
        if self.key:
            opened = queues_of_this_process()
            with opened.lock:
                if opened.counts[self.key]:     # else it was opened before a fork
                    opened.counts[self.key] -= 1
            self.key = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def sql(self, statement, *values):
        """The rows of one statement. Waits while another process writes, 30 s at most."""
        until = time.monotonic() + LOCK_WAIT
        while True:
            try:
                return self.connection.execute(statement, values).fetchall()
            except self.sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise self.unusable(error) from None
                if time.monotonic() > until:
                    raise self.unusable(
                        "another program has it open, such as a database viewer",
                        "close it there, then run the command again") from None
            except (self.sqlite3.Error, UnicodeError) as error:
                raise self.unusable(error) from None

    def insert(self, table, **values):
        """The number of a new row."""
        names = ", ".join(values)
        places = ", ".join("?" * len(values))
        self.sql(f"INSERT INTO {table} ({names}) VALUES ({places})", *values.values())
        rows = self.sql("SELECT last_insert_rowid() AS number")
        return rows[0]["number"]

    def change(self, number, **values):
        """Sets columns of an entry."""
        names = ", ".join(f"{name} = ?" for name in values)
        self.sql(f"UPDATE entry SET {names} WHERE id = ?", *values.values(), number)

    def remember_left_out(self, entry, left_out):
        """Keeps the names of the files that could not be read, until the entry holds them.

        The run is stored in any case. Between the names is a slash, which is in none of them.
        """
        before = str(entry["left_out"] or "").split("/")
        names = [storable_text(name) for name, _ in left_out]
        if not any(before + names):
            return
        with contextlib.suppress(Unavailable):
            held = {file.name for file in self.files(entry["id"])}
            names += [name for name in before if name and name not in held]
            self.change(entry["id"], left_out="/".join(dict.fromkeys(names)) or None)

    def settle(self, entry, **values):
        """Sets columns of an entry that waits, unless it was corrected since it was read."""
        names = ", ".join(f"{name} = ?" for name in values)
        content = str(entry["content"])
        is_damaged = "\ufffd" in content       # then there is nothing to compare
        self.sql(f"UPDATE entry SET {names} WHERE id = ? AND state = 'waiting' "
                 "AND (content = ? OR ?)", *values.values(), entry["id"], content, is_damaged)

    @contextlib.contextmanager
    def transaction(self):
        self.sql("BEGIN IMMEDIATE")
        try:
            yield
            self.sql("COMMIT")
        except BaseException:
            with contextlib.suppress(QueueUnusable):    # the reason is the first error
                self.sql("ROLLBACK")
            raise

    # Reading

    def windows(self, where, *values):
        """Entries (dicts), oldest first, read from the file a few at a time.

        They are without their bodies; `files` is how many they have.
        """
        names = ", ".join(name for name in self.columns if name != "body")
        last = 0
        while True:
            rows = self.sql(
                f"SELECT {names}, (SELECT count(*) FROM file WHERE entry = entry.id) AS files "
                f"FROM entry WHERE {where} AND id > ? ORDER BY id LIMIT {WINDOW}", *values, last)
            entries = [dict(dict.fromkeys(ADDED_COLUMNS), **dict(row)) for row in rows]
            yield entries
            if len(rows) < WINDOW:
                return
            last = rows[-1]["id"]

    def entries(self, where, *values):
        """The same, one after the other."""
        for window in self.windows(where, *values):
            yield from window

    def by_ref(self, ref):
        """The entry of a ref, or None: there is one at most."""
        return next(self.entries("ref = ? AND state != 'storing'", ref), None)

    def latest(self, entry):
        """The entry that a corrected one became, however often it was corrected."""
        while entry["state"] == "fixed":
            corrected = self.by_ref(entry["target"])
            if corrected is None:
                return entry
            entry = corrected
        return entry

    def by_number(self, number):
        return next(self.entries("id = ?", number), None)

    def find(self, ref):
        """The entry whose ref begins so; NotFound or BadInput where none or several do."""
        try:
            ref.encode("utf-8")
        except UnicodeEncodeError:
            ref = ""        # no ref is such a text
        found = self.by_ref(ref)
        if found:
            return found
        entries = []
        if ref:
            import itertools
            found = self.entries("ref >= ? AND ref < ? AND state != 'storing'", ref,
                                 ref + "\U0010ffff")
            entries = list(itertools.islice(found, 50))
        active = [entry for entry in entries if entry["state"] not in ENDED]
        entries = active or entries
        if len(entries) > 1:
            raise BadInput(f"{len(entries)} entries begin with {printable(ref, 80)}",
                           "give more of it")
        if not entries:
            hint = "queue ls names them"
            of_unit = next(self.entries(f"serial_number = ? AND state IN {OPEN}", ref), None)
            if of_unit:
                hint = f"{printable(ref, 80)} is the serial number of {short_ref(of_unit)}"
            raise NotFound(f"no entry {printable(ref, 80)} in {printable(self.path)}", hint)
        return entries[0]

    def body(self, number):
        """The request of an entry as JSON text; None in a receipt, or where it was removed."""
        rows = self.sql("SELECT body FROM entry WHERE id = ?", number)
        return rows[0]["body"] if rows else None

    def files(self, number):
        rows = self.sql("SELECT * FROM file WHERE entry = ? ORDER BY id", number)
        return [QueuedFile(self, row) for row in rows]

    def intact_body(self, entry):
        """The request of an entry, once it and the files are found to be as they were stored.

        Damaged where they are not; Removed where the entry is gone.
        """
        try:
            return self.read_intact(entry)
        except QueueUnusable as error:
            if not is_damaged_page(error):
                raise
            raise Damaged("its pages in the queue file are damaged") from None

    def read_intact(self, entry):
        now = self.by_number(entry["id"])
        if now is None or now["content"] != entry["content"] or now["state"] != entry["state"]:
            raise Removed
        text = self.body(entry["id"])
        if text is None:
            raise Removed
        try:
            body = json.loads(text)
            is_intact = run_ref(body) == entry["content"]
        except (ValueError, TypeError, AttributeError, RecursionError):
            is_intact = False
        if not is_intact:
            raise Damaged("its request in the queue file is damaged")
        for file in self.files(entry["id"]):
            if not file.done:
                file.require_intact()
        return body

    def meta(self):
        """How many entries are waiting, parked, sent and moving; the path and size of the file."""
        rows = self.sql("SELECT state, count(*) AS count FROM entry GROUP BY state")
        counts = {row["state"]: row["count"] for row in rows}
        found = {state: counts.get(state, 0) for state in ("waiting", "parked", "sent", "moving")}
        return dict(found, file=self.path, bytes=os.path.getsize(self.real_path))

    def oldest_waiting(self):
        """When the run that has waited longest was stored (time.time()), or None."""
        rows = self.sql("SELECT stored_at FROM entry WHERE state = 'waiting' ORDER BY id LIMIT 1")
        return rows[0]["stored_at"] if rows else None

    def waiting_servers(self):
        """The servers that waiting entries are for; None stands for whichever is in force."""
        names = [name for name in ("origin", "server") if name in self.columns]
        rows = self.sql(f"SELECT DISTINCT {', '.join(names)} FROM entry WHERE state = 'waiting'")
        return {bound_server(dict(row)) for row in rows}

    # Storing

    def store(self, body, files, server=None, problems=()):
        """Commits a create and its files. Returns the Stored.

        `body` is JSON that can be written; `server` the one that was named, or None; with
        `problems` the entry is parked. The same create is one entry. A file that cannot be read to
        its end is left out.
        """
        values = dict(entry_values(body, problems), server=server, stored_at=time.time(),
                      state="parked" if problems else "waiting")
        return self.insert_or_merge(values, files)

    def insert_or_merge(self, values, files, token=None):
        """Enters an entry with its files, or adds what is missing to the one that is there.

        `token`: of the move that brings it; one that has arrived already changes nothing. Returns
        the Stored.
        """
        self.drop_half_stored()
        with Stage(self, files) as stage:
            while True:
                with self.transaction():
                    there, stored = self.enter(values, stage, token)
                if stored:
                    return stored
                stage.copy_large(there)

    def enter(self, values, stage, token):
        """(the entry that is there or None, the Stored), in the transaction at hand.

        The Stored is None where large files must be copied before.
        """
        old = self.by_ref(values["ref"])
        corrected = self.correction_of(old, values, token)
        if corrected:
            if not stage.has_all_large(corrected):
                return corrected, None
            return corrected, self.add_to_corrected(corrected, stage, token)
        if token and self.has_received(token, values["ref"]):
            return old, Stored(old, stage.left_out)
        there = old
        if old and self.is_superseded(old, values, token):
            there = None
        else:
            self.require_same_run(old, values, token)
        if not stage.has_all_large(there):
            return there, None
        if old and not there:
            self.drop("id = ?", old["id"])
        notes = self.merge(there, values, stage)
        if token:
            self.insert("received", token=token, at=time.time())
        return there, Stored(self.by_ref(values["ref"]), stage.left_out, notes)

    def correction_of(self, old, values, token):
        """The entry that answers for one that was corrected, or None."""
        if old is None or old["state"] != "fixed" or old["content"] != values["content"]:
            return None     # in the last case a reference given by hand is used again
        if token and old["stored_at"] == values["stored_at"]:
            return None     # the correction was undone in the file that it comes from
        corrected = self.latest(old)
        if corrected["state"] == "fixed":
            return None
        if are_for_different_servers(corrected, values):
            raise BadInput(f"{short_ref(old)} was corrected in {printable(self.path)} and goes to "
                           f"{bound_server(corrected)}",
                           "keep what goes to another server in another queue file")
        return corrected

    def add_to_corrected(self, entry, stage, token):
        """The Stored of a create whose run was corrected under another ref; it may add files."""
        files = stage.missing(entry)
        if entry["state"] in OPEN:
            stage.give_to(entry["id"], files)
            return Stored(self.by_number(entry["id"]), stage.left_out)
        reason = f"the run was corrected and is {entry['state']}: use create-attachment"
        if token and files:
            raise BadInput(f"{files[0].name}: {reason}", "save its files with queue get REF "
                           "--download DIR, then queue rm REF")
        left_out = [(file.name, reason) for file in files]
        return Stored(entry, stage.left_out + left_out)

    def is_superseded(self, old, values, token):
        """Whether a receipt does not answer: the run came back, or it went to another server.

        The receipt of a corrected run that was removed does not answer either.
        """
        if old["state"] == "fixed":
            return True
        if old["state"] == "moved" and token is not None:
            return True
        return old["state"] in ENDED and are_for_different_servers(old, values)

    def require_same_run(self, old, values, token):
        """Raises where the entry that has this ref cannot take this create."""
        if old is None:
            return
        if old["content"] != values["content"]:
            raise BadInput(f"client_run_ref {printable(old['ref'], 80)} is another run's in "
                           f"{printable(self.path)}",
                           "give each run a reference of its own, or none")
        is_open = token is not None and old["state"] in OPEN
        if is_open and are_for_different_servers(old, values):
            server = bound_server(old)
            raise BadInput(f"{short_ref(old)} waits there for {server}, and here for "
                           f"{bound_server(values)}", "send one of them first: "
                           + queue_command("send", queue=self.path, url=server))
        if old["state"] == "moving" and token is not None:
            there = move_target(old)[1]
            raise self.unusable("a move out of it is not finished", "repeat that first: "
                                + queue_command("move", there, queue=self.path))

    def merge(self, old, values, stage):
        """Makes one entry of what is there and what is new. Returns notes for people."""
        if old is None:
            number = stage.number
            if number is None:
                number = self.insert("entry", **values)
            else:
                self.change(number, **dict(values, ended_at=None))
            stage.give_to(number)
            return []
        notes = []
        number = old["id"]
        new_files = stage.missing(old)
        if new_files and old["state"] in ("moving", "moved"):
            there = move_target(old)[1]
            raise self.unusable(f"this run has gone to {there}",
                                "add the files there: create with --queue and that file")
        stage.give_to(number, new_files)
        if new_files and old["state"] == "sent":
            self.change(number, state="waiting", next_try_at=0, body=values["body"])
        if values.get("tried_at") and not old["tried_at"]:      # it may be on the server
            self.change(number, tried_at=values["tried_at"], origin=values["origin"],
                        run_id=values["run_id"])
        server = values.get("server")
        goes_to = bound_server(old)
        is_other = server and old["state"] not in ENDED and normal_url(server) != goes_to
        was_begun = old["state"] == "moving" or old["tried_at"] or old["run_id"]
        if is_other and not was_begun:
            self.change(number, server=server)
            if goes_to:
                notes.append(f"it was stored for {goes_to} and goes to {server} now")
        elif is_other and goes_to:
            notes.append(f"it was begun for {goes_to} and goes there alone")
        return notes

    def has_received(self, token, ref):
        """Whether the move of this ref with this token has arrived here before."""
        return bool(self.sql("SELECT 1 FROM received WHERE token = ? UNION ALL "
                             "SELECT 1 FROM entry WHERE ref = ? AND came = ?", token, ref, token))

    def drop(self, where, *values):
        """Deletes entries with all that they hold."""
        self.drop_files(f"entry IN (SELECT id FROM entry WHERE {where})", *values)
        self.sql(f"DELETE FROM entry WHERE {where}", *values)

    def drop_files(self, where, *values):
        """Deletes files with their content."""
        self.drop_content(where, *values)
        self.sql(f"DELETE FROM file WHERE {where}", *values)

    def drop_content(self, where, *values):
        self.sql(f"DELETE FROM chunk WHERE file IN (SELECT id FROM file WHERE {where})", *values)

    def drop_half_stored(self):
        """Frees the room of creates that were killed. A lock tells which of them still live."""
        if not self.sql("SELECT 1 FROM entry WHERE state = 'storing' LIMIT 1"):
            return
        lock = self.sqlite3.connect(self.name + ".storing", timeout=0, isolation_level=None)
        with contextlib.closing(lock):
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except self.sqlite3.Error:
                return      # another process is storing right now
            with self.transaction():
                self.drop("state = 'storing'")
        self.release_room()

    def correct(self, entry, values, files):
        """Replaces the request of an entry that surely is not on a server. Returns the Stored.

        `files` are added, or replace those of the same name. The old ref becomes a receipt.
        """
        with Stage(self, files) as stage:
            stage.copy_large(None)
            names = {file.name for file in stage.files}     # those that could be read
            with self.transaction():
                old = self.by_number(entry["id"])
                require_correctable(old)
                if values["ref"] != old["ref"]:
                    self.rename(old, values["ref"])
                for name in names:
                    self.drop_files("entry = ? AND name = ?", old["id"], name)
                stage.give_to(old["id"])
                self.change(old["id"], tries=0, next_try_at=0, suspect=0, **values)
                corrected = self.by_number(old["id"])
                return Stored(corrected, stage.left_out)

    def rename(self, entry, ref):
        """Leaves a receipt under the old ref of an entry that gets a new one."""
        other = self.by_ref(ref)
        if other and is_receipt_of(other, entry):       # the correction was undone
            self.drop("id = ?", other["id"])
        elif other:
            old = short_ref(entry)
            raise BadInput(f"the corrected run is in the queue already as {ref[:12]} "
                           f"({other['state']}); both stay as they are",
                           f"remove the wrong one: queue rm {old}")
        kept = ("content", "outcome", "serial_number", "procedure_id", "stored_at")
        values = {name: entry[name] for name in kept}
        self.insert("entry", ref=entry["ref"], state="fixed", target=ref, units="[]",
                    ended_at=time.time(), **values)

    # Sending

    def claim(self, entry, origin):
        """Commits that an entry may be on a server from now on; Removed where it changed."""
        with self.transaction():
            self.sql("UPDATE entry SET tried_at = coalesce(tried_at, ?), origin = ? WHERE id = ? "
                     "AND ref = ? AND content = ? AND server IS ? AND state = 'waiting'",
                     time.time(), origin, entry["id"], entry["ref"], entry["content"],
                     entry["server"])
            if not self.changed_rows():
                raise Removed

    def changed_rows(self):
        """How many rows the last statement changed."""
        return self.sql("SELECT changes()")[0][0]

    def retry(self, number):
        """An entry is due at once; one that is parked waits again."""
        self.sql("UPDATE entry SET suspect = 0 WHERE id = ? AND state = 'parked'", number)
        self.sql("UPDATE entry SET state = 'waiting', next_try_at = 0 "
                 f"WHERE id = ? AND state IN {OPEN}", number)

    def retry_waiting(self):
        """All that waits is due at once."""
        self.sql("UPDATE entry SET next_try_at = 0 WHERE state = 'waiting'")

    def name_server(self, server, number=None):
        """An entry that never went out, or each of them, is for that server from now on."""
        self.sql(f"UPDATE entry SET server = ? WHERE state IN {OPEN} AND tried_at IS NULL "
                 "AND run_id IS NULL AND (id = ? OR ? IS NULL)", server, number, number)

    def add_suspicion(self, number, most):
        """Counts a failure of an entry while others were sent. Whether it is parked with that."""
        self.sql("UPDATE entry SET suspect = suspect + 1 WHERE id = ?", number)
        self.sql("UPDATE entry SET state = 'parked', exit_code = 5 WHERE id = ? AND "
                 "state = 'waiting' AND suspect >= ?", number, most)
        return bool(self.changed_rows())

    def make_receipt(self, entry, state):
        """Makes a receipt of an entry: drops the body and the chunks. Whether it could be made.

        It stays as it is, with its run ID, where it got another file meanwhile.
        """
        with self.transaction():
            if state == "sent" and self.sql("SELECT 1 FROM file WHERE entry = ? AND done = 0",
                                            entry["id"]):
                self.change(entry["id"], run_id=entry["run_id"])
                return False
            self.drop_content("entry = ?", entry["id"])
            self.change(entry["id"], state=state, body=None, error=None, ended_at=time.time(),
                        run_id=entry["run_id"])
        return True

    def purge_expired(self):
        """Drops old receipts, and gives the room of all that was dropped back to the disk."""
        now = time.time()
        with self.transaction():
            self.drop(f"state IN {ENDED} AND ended_at < ?", now - RECEIPT_DAYS * DAY)
            self.sql("DELETE FROM received WHERE at < ?", now - TOKEN_DAYS * DAY)
        self.release_room()

    def release_room(self):
        for _ in range(0, self.sql("PRAGMA freelist_count")[0][0], 4000):
            try:        # execute() would free one page: only executescript() goes on to the end
                self.connection.executescript("PRAGMA incremental_vacuum(4000)")
            except self.sqlite3.Error:
                return      # another process is at work: the next pass does it

    @contextlib.contextmanager
    def sender_lock(self):
        """Whether this process is the one sender of the file.

        The lock is on FILE.lock, and the system drops it when the process ends.
        """
        path = self.real_path + ".lock"
        self.make_lock_file(path)
        before = os.stat(path)
        with contextlib.ExitStack() as stack:
            try:
                lock = self.sqlite3.connect(self.name + ".lock", timeout=0, isolation_level=None)
                stack.callback(lock.close)
                lock.execute("BEGIN EXCLUSIVE")
            except self.sqlite3.Error as error:
                if "locked" not in str(error):
                    raise self.unusable(f"its lock file {path}: {error}") from None
            if not os.path.samestat(before, os.stat(path)):
                raise self.unusable(f"its lock file {path} was replaced meanwhile")
            yield lock.in_transaction

    def make_lock_file(self, path):
        """Makes the lock file with the owner and mode of the queue; raises if it is not writable.

        On a file that cannot be written SQLite would take a lock that keeps nobody out.
        """
        info = os.stat(self.real_path)
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        except OSError as error:
            raise self.unusable(f"its lock file {path}: {error.strerror}") from None
        else:
            with contextlib.suppress(AttributeError, OSError):      # Windows; another's queue
                os.fchmod(number, stat.S_IMODE(info.st_mode))
                os.fchown(number, info.st_uid, info.st_gid)
            os.close(number)
        if not os.access(path, os.W_OK):
            raise self.unusable(f"this user cannot write its lock file {path}, which belongs to "
                                f"{owner_of(path)}", "send as that user, or remove the lock file "
                                "while nobody sends")


def import_sqlite(path):
    """The sqlite3 module; QueueUnusable where this Python has none."""
    try:
        import sqlite3
    except ImportError:
        raise queue_unusable(path, "this Python has no sqlite3 module",
                             "use a Python that has it, or create without --queue") from None
    return sqlite3


def queue_unusable(path, reason, hint):
    return QueueUnusable(f"cannot use the queue {printable(path)}: {reason}", hint)


# entry: the entry that holds the run; left_out: (name, reason) of files that could not be read;
# notes: what else people should know.
Stored = collections.namedtuple("Stored", "entry left_out notes")
Stored.__new__.__defaults__ = ((),)


class Stage:
    """The files of a create on their way into a queue.

    Small ones are read into memory and go in with the entry. Large ones are copied before, in
    several transactions, so that others can write between them, under an entry `number` in the
    state "storing"; if anything fails, that is dropped at the end.
    """

    def __init__(self, queue, files):
        self.queue = queue
        self.files = list(files)
        self.small = {}         # file: its content
        self.large = {}         # file: the number of its row
        self.digests = {}       # file: its SHA-256, where it had to be known
        self.left_out = []
        self.number = None
        self.lock = None

    def __enter__(self):
        room = SMALL
        for file in self.files[:]:
            if file.size <= room:
                self.read_small(file)
                room -= file.size
        return self

    def read_small(self, file):
        try:
            data = b"".join(file.blocks())
            self.small[file] = data
            self.digests[file] = digest_to_keep(file, sha256_of([data]))
        except FileFailed as error:
            self.leave_out(file, error)

    def leave_out(self, file, error):
        self.files.remove(file)
        self.left_out.append((file.name, error.message))

    def missing(self, entry):
        """Those of the files that the entry does not hold: name and content tell."""
        if entry is None:
            return list(self.files)
        there = set()
        for file in self.queue.files(entry["id"]):
            there.add((file.name, file.sha256()))
        if not there:
            return list(self.files)
        return [file for file in self.files if (file.name, self.digests[file]) not in there]

    def hash_large(self, entry):
        """Finds the digests of the files if the entry has files to compare them with.

        Outside of any transaction: a large file on a slow disk would keep all others out.
        """
        if entry is None or not entry["files"]:
            return
        for file in self.files[:]:
            try:
                if file not in self.digests:
                    self.digests[file] = file.sha256()
            except FileFailed as error:
                self.leave_out(file, error)

    def has_all_large(self, entry):
        """Whether all large files that the entry lacks are known and copied."""
        has_files = entry is not None and entry["files"]
        if has_files and not all(file in self.digests for file in self.files):
            return False
        for file in self.missing(entry):
            if file not in self.small and file not in self.large:
                return False
        return True

    def copy_large(self, entry):
        """Copies the large files that the entry lacks."""
        self.hash_large(entry)
        for file in self.missing(entry):
            if file in self.small or file in self.large:
                continue
            if self.number is None:
                self.begin()
            try:
                self.copy(file)
            except FileFailed as error:
                with self.queue.transaction():
                    self.queue.drop_files("id = ?", self.large.pop(file))
                self.leave_out(file, error)

    def begin(self):
        """Makes the entry that is not sendable yet, under a lock that tells that we live."""
        queue = self.queue
        queue.make_lock_file(queue.real_path + ".storing")
        self.lock = queue.sqlite3.connect(queue.name + ".storing", timeout=5, isolation_level=None,
                                          check_same_thread=False)
        try:
            self.lock.execute("BEGIN")
            self.lock.execute("SELECT count(*) FROM sqlite_master").fetchall()
        except queue.sqlite3.Error as error:
            raise queue.unusable(f"its file {queue.name}.storing: {error}") from None
        self.number = queue.insert("entry", state="storing", stored_at=time.time(),
                                   ended_at=time.time(), units="[]")

    def copy(self, file):
        """Copies a file in short transactions.

        How much goes into one is found while it goes on, so that none takes much longer than half a
        second; now and then there is a pause in which others get their turn.
        """
        import hashlib
        queue = self.queue
        digest = hashlib.sha256()
        number = insert_file(queue, self.number, file)
        self.large[file] = number
        blocks = enumerate(file.blocks())
        limit, last_pause = SMALL, time.monotonic()
        is_at_end = False
        while not is_at_end:
            started, size = time.monotonic(), 0
            with queue.transaction():
                for part, block in blocks:
                    digest.update(block)
                    queue.sql("INSERT INTO chunk VALUES (?, ?, ?)", number, part, block)
                    size += len(block)
                    if size >= limit:
                        break
                else:
                    is_at_end = True
                    self.digests[file] = digest_to_keep(file, digest.hexdigest())
                    queue.sql("UPDATE file SET sha256 = ? WHERE id = ?", self.digests[file],
                              number)
            took = time.monotonic() - started
            if took < 0.25:
                limit = min(2 * limit, MOST_IN_ONE_COMMIT)
            elif took > 0.5:
                limit = max(limit // 2, BLOCK)
            if time.monotonic() - last_pause > 0.7 and not is_at_end:
                time.sleep(0.15)    # a process that waits for the file asks every 0.1 s
                last_pause = time.monotonic()

    def give_to(self, number, files=None):
        """Makes files those of an entry, in the transaction at hand; all of them if None."""
        queue = self.queue
        for file in self.files if files is None else files:
            if file in self.large:
                queue.sql("UPDATE file SET entry = ? WHERE id = ?", number, self.large[file])
                continue
            row = insert_file(queue, number, file)
            data = self.small[file]
            for part, start in enumerate(range(0, len(data), BLOCK)):
                queue.sql("INSERT INTO chunk VALUES (?, ?, ?)", row, part,
                          data[start:start + BLOCK])
            queue.sql("UPDATE file SET sha256 = ? WHERE id = ?", self.digests[file], row)

    def __exit__(self, *_):
        if self.lock is None:
            return
        try:
            with self.queue.transaction():      # unless it has become the entry itself
                self.queue.drop("state = 'storing' AND id = ?", self.number)
        except QueueUnusable:
            pass        # the next create or send drops it
        finally:
            self.lock.close()


def digest_to_keep(file, digest):
    """The SHA-256 of a file for its row; Damaged where it comes from a queue and has changed."""
    if isinstance(file, QueuedFile):
        if not file.done and file.digest != digest:
            raise Damaged(f"{file.name} is damaged in the queue file")
        return file.digest
    return digest


def insert_file(queue, number, file):
    """The number of a new row for a file of the entry with that number."""
    return queue.insert("file", entry=number, name=file.name, size=file.size,
                        upload_id=file.upload_id, done=int(file.done))


class QueuedFile:
    """A file in the queue, used like a LocalFile; `save` commits how far it has come."""
    needs_bytes = True      # the same name and size alone are not taken for it

    def __init__(self, queue, row):
        self.queue = queue
        self.number = row["id"]
        self.name = row["name"]
        self.size = row["size"]
        self.digest = row["sha256"]
        self.upload_id = row["upload_id"]
        self.done = bool(row["done"])

    def blocks(self):
        for part in range((self.size + BLOCK - 1) // BLOCK):    # by the whole key: no sorting
            rows = self.queue.sql("SELECT data FROM chunk WHERE file = ? AND part = ?",
                                  self.number, part)
            if not rows and self.done:      # it went up before its entry was a receipt
                return
            if not rows or not isinstance(rows[0]["data"], bytes):
                raise Damaged(f"{self.name} is not whole in the queue file")
            yield rows[0]["data"]

    def has_content(self):
        """Whether its bytes are still here."""
        return not self.size or bool(self.queue.sql("SELECT 1 FROM chunk WHERE file = ? LIMIT 1",
                                                    self.number))

    def sha256(self):
        return self.digest

    def require_intact(self):
        is_intact = isinstance(self.size, int) and sha256_of(self.blocks()) == self.digest
        if not is_intact:
            raise Damaged(f"{self.name} is damaged in the queue file")

    def save(self):
        self.queue.sql("UPDATE file SET upload_id = ?, done = ? WHERE id = ?", self.upload_id,
                       int(self.done), self.number)


def entry_values(body, problems=()):
    """The columns of an entry that come from its request, and from what is wrong with it.

    A request without a client_run_ref gets the one that is made from its content.
    """
    content = run_ref(body)
    body = dict(body, client_run_ref=body.get("client_run_ref") or content)
    units = [body.get("serial_number")]
    if isinstance(body.get("sub_units"), list):
        units += body["sub_units"]
    units = {unit.lower() for unit in units if isinstance(unit, str)}
    values = {"ref": body["client_run_ref"], "content": content, "body": dump_json(body),
              "units": dump_json(sorted(units)), "error": None, "exit_code": None}
    for name in ("outcome", "serial_number", "procedure_id"):
        value = body.get(name)
        values[name] = value if isinstance(value, str) else None
    if problems:
        values.update(error=problems_text(problems), exit_code=5)
    return values


def is_damaged_page(error):
    """Whether SQLite says that pages of the file are damaged, not that it cannot be used."""
    return "malformed" in error.message


def short_ref(entry):
    """Enough of a ref for people; commands take it, too."""
    return entry["ref"][:12]


def units_of(entry):
    """The serial numbers in an entry; none where the column is damaged."""
    try:
        return set(json.loads(entry["units"]))
    except (TypeError, ValueError):
        return set()


def is_receipt_of(other, entry):
    """Whether other is what a fix or a move left behind of this entry: a run keeps its time."""
    if other["state"] == "moved":
        return other["stored_at"] == entry["stored_at"]
    return other["state"] == "fixed"


def left_out_names(entry):
    """The names of the files that an entry has to go without."""
    return str(entry["left_out"]).replace("/", ", ")


def move_target(entry):
    """(identity, path) of the queue file that an entry moves to."""
    identity, _, path = (entry["target"] or "").partition(" ")
    return identity, path


def bound_server(entry):
    """The server that an entry is for: the one that it was begun at, or that was named; or None."""
    server = entry.get("origin") or entry.get("server")
    return normal_url(server) if server else None


def are_for_different_servers(entry, values):
    """Whether each of two entries is for a server, and not for the same."""
    server, other = bound_server(entry), bound_server(values)
    return None not in (server, other) and server != other


def default_queue():
    """The queue file of a command that names none."""
    return environment("TOFUPILOT_QUEUE") or os.path.join(home(), "runs.queue")


def queue_command(*words, queue=None, url=None):
    """A command line of `queue`, complete and ready to be copied.

    >>> queue_command("retry", "3e1f", queue="my runs.queue")
    'tofupilot_runs.py queue retry 3e1f --queue "my runs.queue"'
    """
    words = [PROG, "queue", *words]
    if queue:
        words += ["--queue", queue]
    if url:
        words += ["--url", url]
    quoted = []
    for word in words:
        is_plain = re.fullmatch(r"[\w./:@\\=+-]+", word)
        quoted.append(word if is_plain else f'"{word}"')
    return " ".join(quoted)


def problems_text(problems):
    """Problems as the reason of an entry; bounded, since a body may have very many."""
    return storable_text("; ".join(group_issues(problems))[:4000])


def queue_text(meta):
    """2 waiting, 1 parked, and what a move that was interrupted holds back."""
    text = f"{meta['waiting']} waiting, {meta['parked']} parked"
    if meta["moving"]:
        text += f", {meta['moving']} moving (repeat that move)"
    return text


def owner_of(path):
    """The name of a file's owner, or the number of one without a name."""
    number = os.stat(path).st_uid
    try:
        import pwd
        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"


def require_correctable(entry):
    """BadInput unless an entry surely is not on a server, so that it may be changed."""
    if entry is None:
        raise BadInput("the entry was removed meanwhile")
    ref = short_ref(entry)
    if entry["state"] == "fixed":
        raise BadInput(f"{ref} was corrected and has another REF now: {entry['target'][:12]}",
                       "use that one")
    if entry["state"] in ENDED:
        raise BadInput(f"{ref} is {entry['state']}: it is not in the queue any more",
                       "update-metadata corrects a run on the server; rm deletes it")
    if entry["state"] == "moving":
        raise BadInput(f"{ref} is moving to another file", "finish that move, then fix it there")
    if entry["run_id"]:
        raise BadInput(f"{ref} is on the server as run {entry['run_id']}; files are missing there",
                       f"send those first: queue retry {ref}")
    if entry["tried_at"]:
        raise BadInput(f"{ref} was sent without an answer: it may be on the server",
                       f"find out first: queue retry {ref}\nif that is refused, and ls shows no "
                       f"such run: queue rm {ref}, and create it anew")


def move(queue, path):
    """Hands all waiting entries to another queue file.

    Returns (how many, its path, whether it is a new file).

    Three commits for each: mark here, insert there, make a receipt here; repeatable at every point.
    The target is known by its identity (a stick has another path on another machine), a hand-over
    by the token that goes with it.
    """
    if os.path.isdir(path):
        path = os.path.join(path, os.path.basename(queue.path))
    is_new = not os.path.exists(path)
    with queue.sender_lock() as is_alone:
        if not is_alone:
            raise Unavailable("another process is sending this queue", "try again when it is done")
        with Queue(path) as target:
            if target.identity == queue.identity:
                raise BadInput("source and target are the same queue")
            mark_moving(queue, target)
            count = 0
            refusal = None
            held = set()        # units of runs that stay here: their younger runs stay, too
            for entry in queue.entries("state = 'moving'"):
                if units_of(entry) & held:
                    continue
                try:
                    count += hand_over(queue, target, entry)
                except Damaged as error:
                    queue.change(entry["id"], state="parked", error=error.text, exit_code=5)
                except BadInput as error:       # this one stays here, and the others go on
                    refusal = refusal or error
                    held |= units_of(entry)
                except Error as error:
                    refusal = error
                    break
            if refusal:
                take_back(queue, target)
                total = count + sum(1 for _ in queue.entries("state = 'waiting'"))
                raise refusal.with_note(f"{count} of {counted(total, 'run')} moved")
            queue.purge_expired()
            return count, target.path, is_new


def mark_moving(queue, target):
    """First commit of a move: from now on the waiting entries cannot be sent from here."""
    for entry in queue.entries("state = 'moving'"):
        identity, other = move_target(entry)
        if identity != target.identity:
            raise BadInput(f"a move to another file is not finished: {other}",
                           "move to that file first; if it is lost, get each run back with\n"
                           + queue_command("get", "REF", "--json", queue=queue.path))
    with queue.transaction():
        queue.sql("UPDATE entry SET state = 'moving', target = ?, hop = ? || id "
                  "WHERE state = 'waiting'",
                  storable_text(f"{target.identity} {target.path}"), os.urandom(16).hex())


def hand_over(queue, target, entry):
    """Second and third commit of a move, for one entry. Returns 1, or 0 if it was removed."""
    body = queue.body(entry["id"])
    if body is None:        # queue rm was quicker
        return 0
    values = dict(entry)
    for name in ("id", "files", "hop"):
        del values[name]
    values.update(body=body, state="waiting", target=None, came=entry["hop"])
    target.insert_or_merge(values, queue.files(entry["id"]), entry["hop"])
    queue.make_receipt(entry, "moved")
    return 1


def take_back(queue, target):
    """After a move that failed: what surely did not arrive there waits here again.

    Where the other file cannot be asked, the entries stay as they are, and the move is repeated.
    """
    with contextlib.suppress(QueueUnusable):
        for entry in queue.entries("state = 'moving'"):
            if not target.has_received(entry["hop"], entry["ref"]):
                queue.change(entry["id"], state="waiting", target=None, hop=None)


# ---- sending -------------------------------------------------------------------------------------

SUB_UNIT_HOURS = 72         # how long a run may wait for the runs of its sub-units
SUB_UNIT_DELAY = 21600      # seconds at most between two tries while it does
MOST_LANES = 4              # entries that are sent at the same time
MOST_FAILURES = 3           # failures in a row that end a pass
MOST_SUSPECT = 10           # failures of one entry, while others were sent, that park it
CALM_SECONDS = 120          # after a server was overloaded, there is one lane for so long

# What becomes of an entry that failed. state: waiting or parked; wait: seconds until it is due
# again; effect on the pass: "end", "count" (three in a row end it) or "go on"; is_suspect: whether
# it may be this one request that something on the way does not like.
Verdict = collections.namedtuple("Verdict", "state wait effect is_suspect")
Verdict.__new__.__defaults__ = (0, "go on", False)


def judge(error, tries, waited_for_units=None, suspect=0):
    """The Verdict on an entry that failed with an error after so many tries.

    `waited_for_units`: seconds since a run with sub-units was stored, None for one without;
    `suspect`: how often it failed before while others were sent, or at the storage.
    """
    status = error.status
    retry_wait = delay(tries, 15, error.retry_after)
    if isinstance(error, AccessDenied):
        if status == 403:   # a station key gets it for a procedure that is not linked
            return Verdict("waiting", MAX_DELAY, "count")
        return Verdict("waiting", effect="end")
    if status in OVERLOADED:
        return Verdict("waiting", retry_wait, "end")
    if status in (408, 425):
        return Verdict("waiting", retry_wait)
    if isinstance(error, FileFailed):
        if (status or 0) >= 500 or error.is_network:
            return Verdict("waiting", retry_wait, "count", is_suspect=True)
        state = "parked" if suspect + 1 >= MOST_SUSPECT else "waiting"
        return Verdict(state, retry_wait)
    if isinstance(error, Unavailable):
        if not error.maybe_sent and status is None:
            return Verdict("waiting", effect="end")
        return Verdict("waiting", retry_wait, "count", is_suspect=True)
    if waited_for_units is not None and is_about_sub_unit(error):
        if waited_for_units < SUB_UNIT_HOURS * 3600:
            wait = max(900, waited_for_units / 8)       # not by tries: the network may have failed
            return Verdict("waiting", min(wait, SUB_UNIT_DELAY))
    return Verdict("parked")


def is_due(entry, now):
    """Whether its wait is over; a clock that was set back does not make it longer."""
    was_set_back = now < (entry["failed_at"] or 0) - 60
    return was_set_back or now >= entry["next_try_at"]


class Lane:
    """The connections, to the queue file and to the server, that send one entry after the other."""

    def __init__(self, path, client):
        self.queue = Queue(path, must_exist=True)
        self.client = client.clone()

    def close(self):
        self.queue.close()
        self.client.close()

    def send(self, entry):
        """Sends an entry and its files, and makes a receipt of it."""
        queue, client, number = self.queue, self.client, entry["id"]
        body = queue.intact_body(entry)
        if not entry["run_id"]:
            def known_run_ids():
                rows = queue.sql("SELECT run_id FROM entry WHERE run_id IS NOT NULL AND "
                                 "lower(serial_number) = lower(?)", entry["serial_number"])
                return {row["run_id"] for row in rows}

            def claim():
                queue.claim(entry, client.login.url)
            made = client.send_create(body, entry["tried_at"], known_run_ids, claim)
            entry["run_id"] = made["id"]
            if entry["files"]:
                queue.change(number, run_id=made["id"])
        while True:
            files = queue.files(number)
            if files:
                attach(client, entry["run_id"], files)
            if queue.make_receipt(entry, "sent"):
                return


class SendPass:
    """One pass over a queue: what is due is sent, oldest first, up to four entries at a time.

    An entry that shares a unit with an older one that waits or is under way waits for it. Apart
    from that no entry stops another. It begins with one lane, uses more once an answer came, and
    one again after 429 or 503. `sent` has the numbers of the entries that went, `failures` the
    first few as (entry, error text); `exit_codes` those of all failures; `elsewhere` how many wait
    for each other server.
    """

    def __init__(self, queue, client, tell=ignore):
        """`tell` is called with a line for each entry."""
        import array
        import threading
        self.queue = queue
        self.client = client
        self.tell = tell
        self.changed = threading.Condition()
        self.idle_lanes = []
        self.in_flight = {}     # number of an entry under way: its units
        self.width = 1          # how many may be under way
        self.is_calm = False    # whether it stays at one
        self.blocked = set()    # units whose older entry waits
        self.assemblies = {}    # unit: numbers of the entries that wait for its run
        self.suspects = []      # numbers of entries that failed before one was sent
        self.failures_in_a_row = 0
        self.is_stopped = False
        self.crash = None       # what ended the pass other than an answer
        self.sent = array.array("q")
        self.failures = []
        self.exit_codes = set()
        self.elsewhere = collections.Counter()

    def run(self):
        """False where another process is sending this queue."""
        with self.queue.sender_lock() as is_alone:
            if is_alone:
                self.queue.drop_half_stored()
                self.send_all()
                self.queue.purge_expired()
            return is_alone

    def send_all(self):
        self.is_calm = self.was_overloaded()
        try:
            for entry in self.queue.entries("state = 'waiting'"):
                if self.is_stopped:
                    break
                try:
                    self.consider(entry)
                except (TypeError, ValueError, AttributeError) as error:
                    with self.changed:
                        self.fail(self.queue, entry, damage(error))
            self.wait_until(lambda: not self.in_flight)
        except Exception:
            self.is_stopped = True      # a lane that is under way finishes its entry
            self.wait_until(lambda: not self.in_flight)
            raise
        finally:
            self.is_stopped = True
            with self.changed:
                for lane in self.idle_lanes:
                    lane.close()
        if self.crash:
            raise self.crash
        for server, count in self.elsewhere.items():
            self.exit_codes.add(6)
            self.tell(f"{counted(count, 'run')} waiting for {server}: name it with --url; if that "
                      "address is wrong, queue retry --url takes what never went out to another")

    def was_overloaded(self):
        """Whether the server had too much to do a short time ago: then one lane is enough."""
        since = time.time() - CALM_SECONDS
        for state, order in (("waiting", "ASC"), ("sent", "DESC")):
            rows = self.queue.sql("SELECT status, failed_at FROM entry WHERE state = ? "
                                  f"ORDER BY id {order} LIMIT {WINDOW}", state)
            for row in rows:
                if row["status"] in OVERLOADED and (row["failed_at"] or 0) > since:
                    return True
        return False

    def consider(self, entry):
        """Starts to send an entry if it is due and no older one stands before it."""
        units = units_of(entry)
        server = bound_server(entry)
        if server not in (None, self.client.login.url):
            self.elsewhere[server] += 1
            self.blocked |= units
            return
        if not is_due(entry, time.time()):
            self.block(entry, entry["exit_code"])
            return
        self.wait_until(lambda: self.has_room_for(units))
        if self.is_stopped:
            return
        if units & self.blocked:
            self.blocked |= units
            return
        self.in_flight[entry["id"]] = units
        try:
            start_thread(self.work, entry)
        except RuntimeError:    # no thread can be had: then one after the other
            self.work(entry)

    def has_room_for(self, units):
        """Whether an entry of these units may go out beside those under way."""
        if len(self.in_flight) >= self.width:
            return False
        for others in self.in_flight.values():
            if units & others:
                return False
        return True

    def wait_until(self, holds):
        """Waits for lanes to come to an end; in short steps, so that Windows lets Ctrl-C in."""
        with self.changed:
            while not holds() and not (self.is_stopped and not self.in_flight):
                self.changed.wait(0.2)

    def work(self, entry):
        """Sends one entry in a lane, and notes what came of it. Runs in a thread of its own."""
        lane = error = None
        try:
            with self.changed:
                lane = self.idle_lanes.pop() if self.idle_lanes else None
            lane = lane or Lane(self.queue.path, self.client)
            lane.send(entry)
        except Error as failure:
            error = failure
        except Exception as failure:
            error = damage(failure)
        with self.changed:
            try:
                self.finish(lane, entry, error)
            except Exception as failure:
                self.crash = failure
                self.is_stopped = True
            del self.in_flight[entry["id"]]
            if lane and self.is_stopped:
                lane.close()
            elif lane:
                self.idle_lanes.append(lane)
            self.changed.notify_all()

    def finish(self, lane, entry, error):
        """Records how an entry ended: `error`, or None; the pass may end with it."""
        if isinstance(error, Removed):      # another command was quicker; nothing was sent
            return
        if error is None:
            self.failures_in_a_row = 0
            self.sent.append(entry["id"])
            self.count_suspects(lane.queue)
            for number in self.assemblies.pop(str(entry["serial_number"]).lower(), ()):
                lane.queue.change(number, next_try_at=0)
            self.tell(sent_text(entry))
        elif lane is None or isinstance(error, QueueUnusable):
            self.crash = error
            self.is_stopped = True
            return
        else:
            self.fail(lane.queue, entry, error)
        if lane.client.transport.was_overloaded:
            self.width = 1
            self.is_calm = True
        elif not self.is_calm and (error is None or error.status):
            self.width = MOST_LANES     # an answer came

    def fail(self, queue, entry, error):
        """Commits what becomes of an entry that failed, and what the pass does then."""
        now = time.time()
        tries = number_in(entry, "tries")
        suspect = number_in(entry, "suspect")
        waited_for_units = None
        if len(units_of(entry)) > 1:
            waited_for_units = now - number_in(entry, "stored_at")
        verdict = judge(error, tries, waited_for_units, suspect)
        reason = reason_text(error)
        exit_code = error.exit_code if error.exit_code in (3, 6) else 5
        tried_at, origin = self.begun_at(entry, error, now)
        queue.settle(
            entry, state=verdict.state, tries=tries + 1, failed_at=now, status=error.status,
            next_try_at=now + verdict.wait, exit_code=exit_code, error=reason[:4000],
            tried_at=tried_at, origin=origin, run_id=entry["run_id"])
        if verdict.is_suspect:
            self.suspects.append(entry["id"])
            if self.sent:
                self.count_suspects(queue)
        elif isinstance(error, FileFailed):
            queue.change(entry["id"], suspect=suspect + 1)
        self.exit_codes.add(exit_code)
        if len(self.failures) < MOST_FAILURES:
            self.failures.append((entry, reason))
        if verdict.state == "waiting":
            self.block(entry, exit_code)
        self.note_failure(verdict)
        text = f"{verdict.state} {entry['serial_number']}: {reason[:300]}"
        if verdict.wait:
            text += f"; next try in {verdict.wait:.0f} s"
        is_refused = verdict.state == "parked" and isinstance(error, (NotFound, Refused))
        if is_refused and not tried_at and not entry["run_id"]:
            text += "; to correct it: " + queue_command("fix", short_ref(entry), queue=queue.path)
        self.tell(text)

    def begun_at(self, entry, error, now):
        """(tried_at, origin) of an entry that failed; (None, None) if surely no run is there.

        Exactly once rests on this: where they stand, the run may be on the server.
        """
        # 409 may mean that an earlier try made a run under this ref.
        is_final = isinstance(error, (Refused, NotFound)) and error.status != 409
        if is_final and not error.maybe_sent and not entry["run_id"]:
            return None, None
        if entry["run_id"] or entry["tried_at"] or error.maybe_sent:
            return entry["tried_at"] or now, self.client.login.url
        return None, None

    def block(self, entry, exit_code):
        """From now on younger runs of the same units wait.

        Where the entry waits for the runs of its sub-units, those may pass.
        """
        is_for_sub_units = exit_code == 5       # else what is refused does not wait
        if is_for_sub_units:
            own = str(entry["serial_number"]).lower()
            self.blocked.add(own)
            for unit in units_of(entry) - {own}:
                self.assemblies.setdefault(unit, []).append(entry["id"])
        else:
            self.blocked |= units_of(entry)

    def note_failure(self, verdict):
        """The pass ends with three failures in a row, or with one that ends it alone."""
        if verdict.effect == "count":
            self.failures_in_a_row += 1
        else:
            self.failures_in_a_row = 0
        if verdict.effect == "end" or self.failures_in_a_row >= MOST_FAILURES:
            self.is_stopped = True

    def count_suspects(self, queue):
        """Counts the failures of entries while others are sent; ten of them park one."""
        for number in self.suspects:
            if queue.add_suspicion(number, MOST_SUSPECT):
                self.exit_codes.add(5)
        self.suspects = []


def sent_text(entry):
    """The line of the log for an entry that was sent."""
    text = f"sent {entry['serial_number']} {entry['outcome']} as run {entry['run_id']}"
    if entry["left_out"]:
        text += ", without " + left_out_names(entry)
    return text


def damage(error):
    """The Error for what an entry makes this program raise: its data must be damaged."""
    return Damaged(f"unexpected {type(error).__name__}: {error}")


def number_in(entry, name):
    """A number of an entry; 0 where the column is empty or damaged."""
    return entry[name] if is_number(entry[name]) else 0


def reason_text(error):
    """Why an entry failed, as one line that can be stored."""
    reasons = group_issues(error.issues)[:20]
    reasons += [error.message, *error.notes]
    if error.hint != error.usual_hint:      # it says more than that it waits, or is parked
        reasons += error.hint.splitlines()
    lines = [" ".join(reason.split()).rstrip(".") for reason in reasons]
    return storable_text("; ".join(lines))


def store(body: dict, files=(), queue: str = None, url: str = None) -> dict:
    """Stores a run in a queue file, to be sent later: as `create --offline`, without a process.

    `body` is the request of a create (times as datetime or text), `files` are paths or (name,
    bytes), `queue` the file (None: as on the command line), `url` the server that the run is for.
    Returns {"client_run_ref", "state", "problems"}: what is wrong with the content is told there
    and parks the run. Unavailable where the queue cannot be written: the run is NOT stored;
    BadInput where the body is no dict.
    """
    if not isinstance(body, dict):
        raise BadInput("the body of a run must be a dict")
    values = {storable_text(key): value for key, value in body.items()}
    wire, findings = examine("create", values)
    problems = findings.problems
    opened, unreadable = open_files(files)
    if url is not None:
        url = storable_text(url)
    server = named_server(url, allow_http=True, warn=ignore)
    with Queue(queue or default_queue()) as queue_file:
        stored = queue_file.store(storable_request(wire, problems), opened, server, problems)
        left_out = unreadable + stored.left_out
        queue_file.remember_left_out(stored.entry, left_out)
    problems = problems + left_out_problems(left_out)
    entry = stored.entry
    return {"client_run_ref": entry["ref"], "state": entry["state"], "problems": problems}


def left_out_problems(left_out):
    """The files that were left out of a run, as problems."""
    return [f"{name}: left out, {reason}" for name, reason in left_out]


def storable_request(wire, problems):
    """A request as JSON that can be stored, whatever is wrong with it; without problems it is."""
    if not problems:
        return wire
    body = storable(wire)
    if not isinstance(body.get("client_run_ref"), str):
        body.pop("client_run_ref", None)
    return body


def open_files(files):
    """([file], [(name, reason)] of those that cannot be read) of paths or (name, bytes)."""
    opened, unreadable = [], []
    for item in path_list(files):
        try:
            if isinstance(item, tuple):
                name, data = item
                opened.append(MemoryFile(storable_text(os.fspath(name)), bytes(memoryview(data))))
            else:
                opened.append(LocalFile(os.fspath(item)))
        except BadInput as error:
            unreadable.append((os.path.basename(str(item)), error.message))
        except (OSError, TypeError, ValueError) as error:
            unreadable.append((storable_text(item)[:80], f"no path and no (name, bytes): {error}"))
    return opened, unreadable


# ---- screens -------------------------------------------------------------------------------------

Column = collections.namedtuple("Column", "title path importance kind")
Column.__doc__ = """A column of a table. `path` is the dotted path of its value.

Where a terminal has too little room the column of the least `importance` goes first; of equal
ones the last. `kind`: "fixed" is never cut, "shared" gets a share of the room, "extra" is shown
only where nothing has to be cut for it, "below" has a line of its own below the row.
"""
RUN_COLUMNS = (Column("ID", "id", 3, "fixed"), Column("OUTCOME", "outcome", 5, "fixed"),
               Column("SERIAL", "unit.serial_number", 4, "shared"),
               Column("PROCEDURE", "procedure.name", 1, "shared"),
               Column("STARTED", "started_at", 2, "fixed"),
               Column("PART", "unit.part.number", 0, "extra"),
               Column("DURATION", "duration", 0, "extra"),
               Column("STATION", "created_by_station.name", 0, "extra"))
QUEUE_COLUMNS = (Column("REF", "client_run_ref", 6, "fixed"), Column("STATE", "state", 5, "fixed"),
                 Column("OUTCOME", "outcome", 3, "fixed"),
                 Column("SERIAL", "serial_number", 4, "shared"),
                 Column("STORED", "stored_at", 1, "fixed"), Column("TRIES", "tries", 0, "fixed"),
                 Column("ERROR", "error", 2, "below"))
RUN_ID_COLUMN = Column("RUN", "run_id", 5, "fixed")
RECEIPT_COLUMNS = QUEUE_COLUMNS[:2] + (RUN_ID_COLUMN,) + QUEUE_COLUMNS[2:]
SENT_COLUMNS = ("client_run_ref", "id")
RUN_CSV_COLUMNS = """id outcome unit.serial_number unit.part.number unit.part.revision.number
    unit.batch.number procedure.id procedure.name procedure.version.tag started_at ended_at
    duration created_by_station.name operated_by.name""".split()
MEASUREMENT_COLUMNS = """run_id serial_number procedure started_at phase attempt name value units
    limits outcome""".split()
OWN_OF_MEASUREMENTS = set(MEASUREMENT_COLUMNS) - {"procedure", "started_at", "outcome"}
COLOURS = {"PASS": 32, "FAIL": 31, "ERROR": 35, "TIMEOUT": 35, "ABORTED": 33, "SKIP": 33,
           "UNSET": 33, "WARN": 33}
LEAST_WIDTH = 8             # columns of a terminal that a shared column keeps
WORKBOOK_ROWS = 1 << 20     # rows of a sheet
WORKBOOK_TEXT = 32767       # characters of a cell


def as_column(item):
    """A Column from itself, a (title, path), or a path alone."""
    if isinstance(item, Column):
        return item
    title, path = (item, item) if isinstance(item, str) else item
    is_fixed = path.endswith(("outcome", "id", "_at", "_ref"))
    return Column(title, path, 0, "fixed" if is_fixed else "shared")


def as_windows(rows):
    """Lists of rows, one after the other, from one list or from an iterator of lists."""
    return [rows] if isinstance(rows, (list, tuple)) else rows


class Result:
    """What a command returns; a Screen writes it.

    `exit_code` is the exit status, or a function that gives it once all is written. `error` is an
    Error that is told after all else is written.
    """
    error = None

    def __init__(self, windows, columns, exit_code):
        self.windows = windows      # lists of rows, as they come
        self.columns = [as_column(item) for item in columns]
        self.csv_columns = [column.path for column in self.columns]
        self.exit_code = exit_code
        self.document = {}          # JSON: all of it, or what stands beside "data"
        self.lines = None           # texts, or a function of the Screen
        self.ids = None             # what -q prints; None: the ID of each row
        self.id_key = "id"          # where a row has its ID
        self.rows_key = "data"      # JSON: where the document has the rows
        self.is_logged = False      # people have read it all in a log already
        self.report_lines = None    # for runs: a function of a run and the Screen
        self.has_runs = False       # whole runs, whose measurements are the rows of a spreadsheet
        self.failed_only = False    # of those measurements the ones that failed
        self.is_single = False      # JSON: the object itself

    @classmethod
    def text(cls, document, lines, ids=None, rows=None, exit_code=0):
        """A JSON document that people read as lines. `rows` are for CSV and its like."""
        rows = [document] if rows is None else list(rows)
        result = cls([rows], list(rows[0]) if rows else [], exit_code)
        result.document = document
        result.lines = lines
        result.ids = ids
        return result

    @classmethod
    def table(cls, document, rows, columns, id_key="id", rows_key="data", is_logged=False,
              exit_code=0):
        """Rows in a list, or lists of rows as they come; `document` has what JSON adds to them.

        What stands under `rows_key` there is written from the rows.
        """
        result = cls(as_windows(rows), columns, exit_code)
        result.document = document
        result.id_key = id_key
        result.rows_key = rows_key
        result.is_logged = is_logged
        return result

    @classmethod
    def pages(cls, pages, columns, csv_columns=None, exit_code=0):
        """Pages of a list, (rows, meta), as they arrive."""
        result = cls((), columns, exit_code)
        result.document = {"meta": lambda: result.last_meta}
        result.last_meta = {"has_more": False, "next_cursor": None}
        result.windows = result.read_pages(pages)
        result.csv_columns = csv_columns or RUN_CSV_COLUMNS
        return result

    @classmethod
    def runs(cls, runs, report_lines, single, exit_code=0):
        """Whole runs as they come. People read report_lines(run, screen), a spreadsheet gets a row
        for each measurement, JSON has the server's object, in "data" unless `single`."""
        result = cls(([run] for run in runs), [], exit_code)
        result.csv_columns = MEASUREMENT_COLUMNS
        result.report_lines = report_lines
        result.has_runs = True
        result.is_single = single
        return result

    def exit_status(self):
        """The exit status, once all is written."""
        return self.exit_code() if callable(self.exit_code) else self.exit_code

    def read_pages(self, pages):
        try:
            for rows, self.last_meta in pages:
                yield rows
        except Error as error:
            self.last_meta = {"has_more": True, "next_cursor": error.cursor}
            raise


class ColumnPath:
    """A dotted path, split once, and whether it was there in the rows seen."""

    def __init__(self, path):
        self.path = path
        self.keys = path.split(".")
        self.depth = 0              # how many of the keys were ever there
        self.is_missing = False     # an object was there that does not hold the next key
        self.siblings = set()       # what such objects hold instead

    def value(self, row):
        for key in self.keys:
            if not isinstance(row, dict):
                return None
            row = row.get(key)
        return row

    def observe(self, row):
        """Remembers how far the path leads in this row."""
        if self.depth == len(self.keys):
            return
        for depth, key in enumerate(self.keys):
            if not isinstance(row, dict):
                return
            if key not in row:
                if depth == self.depth:
                    self.is_missing = True
                    self.siblings.update(list(row)[:1000 - len(self.siblings)])
                return
            if depth == self.depth:
                self.depth += 1
                self.is_missing = False
                self.siblings = set()
            row = row[key]

    def warning(self):
        """What to tell about a path that no object holds, or None."""
        if not self.is_missing:
            return None
        text = f"--columns: {self.path} is in none of the rows"
        meant = self.usual_path()
        guess = closest(self.keys[self.depth], sorted(self.siblings))
        if meant is None and guess:
            keys = list(self.keys)
            keys[self.depth] = guess
            meant = ".".join(keys)
        if meant is None:
            return f"{text}; --help lists the usual ones"
        return f"{text}; did you mean {meant}?"

    def usual_path(self):
        """The column of a run for a column of measurements, and the other way round, or None."""
        last = self.keys[-1]
        if self.depth == 0 and last in self.siblings:
            return last
        words = "_".join(self.keys)
        first_keys = set(self.siblings)
        if self.depth:
            first_keys = {self.keys[0]}
        for path in RUN_CSV_COLUMNS:
            is_here = path.partition(".")[0] in first_keys
            same = "_" + path.replace(".", "_")
            if is_here and same.endswith("_" + words):
                return path
        return None


class Screen:
    """Writes a Result as table or text, JSON, JSON lines, CSV or a workbook.

    `columns` is the text of --columns, `warn` a function that tells a warning.
    """

    def __init__(self, stream, format="table", columns=None, quiet=False, warn=lambda text: None):
        self.stream = stream
        self.format = format
        self.is_quiet = quiet
        self.warn = warn
        self.asked = []
        if columns:
            self.asked = [path.strip() for path in columns.split(",")]
        self.paths = []
        self.runs_seen = 0          # by rows_of, with failed_only
        self.runs_without = 0       # of these those without a row
        self.serials_without = []   # of the first three of these
        self.tty = format == "table" and isatty(stream)
        self.width = terminal_width() if self.tty else 0
        wants_colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.colour = self.tty and wants_colour and console_takes_colour()

    def write(self, result):
        if self.format == "xlsx" and not self.is_quiet and isatty(self.stream):
            raise BadInput("xlsx needs --out or a pipe", "such as --out runs.xlsx")
        if self.is_quiet:
            self.write_ids(result)
        else:
            writers = {"json": self.write_json, "jsonl": self.write_json_lines,
                       "csv": self.write_csv, "xlsx": self.write_workbook}
            writers.get(self.format, self.write_for_people)(result)
        self.stream.flush()
        for path in self.paths if self.asked else ():
            warning = path.warning()
            if warning:
                self.warn(warning)
        if self.runs_without:
            serials = " ".join(self.serials_without)
            if self.runs_without > len(self.serials_without):
                serials += " ..."
            total = counted(self.runs_seen, "run")
            self.warn(f"no failed measurement in {self.runs_without} of {total}: {serials}")

    def put(self, lines):
        self.stream.write("".join(f"{line}\n" for line in lines))
        self.stream.flush()

    def write_ids(self, result):
        for rows in result.windows:
            if result.ids is None:
                self.put(printable(row.get(result.id_key)) for row in rows)
        if result.ids is not None:
            self.put(printable(id) for id in result.ids)

    def write_json(self, result):
        if result.is_single:
            for rows in result.windows:
                self.put(dump_json(row, 2) for row in rows)
        elif result.lines is not None:
            self.put([dump_json(result.document, 2)])
        else:
            self.stream_json(result)

    def stream_json(self, result):
        """{"data": [...], "meta": {...}} as it arrives; closed properly when a page fails."""
        separator = "\n"
        self.stream.write(f"{{{dump_json(result.rows_key)}: [")
        try:
            for rows in result.windows:
                if rows:
                    self.stream.write(separator + ",\n".join(map(dump_json, rows)))
                    separator = ",\n"
                self.stream.flush()
        finally:
            self.stream.write("\n]")
            for key, value in result.document.items():
                value = value() if callable(value) else value
                self.stream.write(f", {dump_json(key)}: {dump_json(value)}")
            self.stream.write("}\n")

    def write_json_lines(self, result):
        self.paths = [ColumnPath(path) for path in self.asked]
        for rows in self.rows_of(result, with_points=True):
            if self.asked:
                rows = [dict(zip(self.asked, self.values(row))) for row in rows]
            self.put(map(dump_json, rows))

    def rows_of(self, result, with_points=False):
        """Lists of the rows of the result; of runs those of their measurements, unless only columns
        of runs are asked for.

        A row of a measurement has the fields of its run too.
        """
        is_asked_for = not self.asked or not set(self.asked).isdisjoint(OWN_OF_MEASUREMENTS)
        for rows in result.windows:
            if not result.has_runs or not is_asked_for:
                yield rows
                continue
            for run in rows:
                measurements = measurement_rows(run, with_points=with_points)
                if result.failed_only:
                    measurements = [row for row in measurements if row["outcome"] == "FAIL"]
                    self.note_failures(run, measurements)
                yield [self.with_run(row, run) for row in measurements]

    def note_failures(self, run, rows):
        """Remembers a run that has no row of a failed measurement, to tell it at the end."""
        self.runs_seen += 1
        if rows:
            return
        self.runs_without += 1
        if len(self.serials_without) < 3:
            self.serials_without.append(printable(get_path(run, "unit.serial_number"), 60))

    def with_run(self, row, run):
        """The row of a measurement; with the fields of its run where columns are asked for."""
        if not self.asked:
            return row
        merged = dict(run)
        for name in row:
            if name in self.asked:
                merged[name] = row[name]
        return merged

    def values(self, row):
        """The values of a row at the paths."""
        if self.asked:
            for path in self.paths:
                path.observe(row)
        return [path.value(row) for path in self.paths]

    def write_csv(self, result):
        import csv
        self.paths = [ColumnPath(path) for path in self.asked or result.csv_columns]
        writer = csv.writer(self.stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow([csv_text(path.path) for path in self.paths])
        for rows in self.rows_of(result):
            writer.writerows([csv_text(value) for value in self.values(row)] for row in rows)
            self.stream.flush()

    def write_workbook(self, result):
        paths = self.asked or result.csv_columns
        self.paths = [ColumnPath(path) for path in paths]
        with Workbook(getattr(self.stream, "buffer", self.stream), paths) as book:
            for rows in self.rows_of(result):
                for row in rows:
                    book.write(self.values(row))

    def write_for_people(self, result):
        if self.asked:
            self.write_table(result, [as_column(path) for path in self.asked])
        elif result.has_runs:
            self.write_reports(result)
        elif result.is_logged:
            return
        elif result.lines is None:
            self.write_table(result, result.columns)
        elif callable(result.lines):
            self.put(result.lines(self))
        else:
            self.put(map(printable, result.lines))

    def write_reports(self, result):
        is_first = True
        for rows in result.windows:
            for run in rows:
                if not is_first:
                    self.put([""])
                is_first = False
                self.put(result.report_lines(run, self))

    def write_table(self, result, columns):
        """A table fitted to the terminal, from the first rows on; tabs between in a pipe."""
        below = [column.path for column in columns if column.kind == "below" and self.tty]
        left_out = "below" if self.tty else "extra"
        columns = [column for column in columns if column.kind != left_out]
        self.paths = [ColumnPath(column.path) for column in columns]
        table = [[printable(column.title) for column in columns]]
        notes = [[]]            # for each line of the table what stands below it
        widths = None
        for rows in self.rows_of(result):
            for row in rows:
                cells = []
                for value, path in zip(self.values(row), self.paths):
                    cells.append(format_cell(value, path.path, self.tty))
                table.append(cells)
                values = [row.get(path) for path in below]
                notes.append(["  " + printable(value, 500) for value in values if value])
            if self.tty and widths is None:
                widths = column_widths(table, columns, self.width, keep_all=bool(self.asked))
            lines = []
            for cells, texts in zip(table, notes):
                lines.append(self.table_line(cells, widths))
                lines += texts
            self.put(lines)
            table, notes = [], []
        self.put("\t".join(line) for line in table)     # no rows at all

    def table_line(self, line, widths):
        if widths is None:
            return "\t".join(line)
        cells = []
        for number, width in widths:
            text = truncate(line[number], width)
            if self.paths[number].path == "outcome":
                text = self.paint(text)
            cells.append(text)
        return "  ".join(cells).rstrip()

    def paint(self, text):
        """An outcome in its colour, where this screen has colours."""
        return colorize(text) if self.colour else text


def error_text(error):
    """What people read of an Error: what failed, why, what to do next."""
    lines = error.text.split("\n")
    kinds = group_issues(error.issues)
    for kind in kinds[:20]:
        text = printable(kind, 500)
        lines.append(text)
    more = len(kinds) - 20
    if more > 0:
        lines.append(f"and {more} more kinds of problem (all of them with --json)")
    prefix = "Fix: "
    for line in error.hint.split("\n"):
        if line:
            lines.append(prefix + line)
            prefix = ""
    shown = map(printable, lines)
    text = "\n  ".join(shown)
    return f"error: {text}"


def isatty(stream):
    """Whether there is a terminal: services have no streams, or closed ones."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def drop_stdout():
    """What is still to be written to stdout goes nowhere: it is closed, or its disk is full."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def terminal_width():
    """Columns of the terminal. As in shutil, whose import takes longer than all of this."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        given = int(os.environ.get("COLUMNS") or 0)
        return given or os.get_terminal_size(sys.__stdout__.fileno()).columns or 80
    return 80


def console_takes_colour():
    """Whether SGR sequences work here; Windows has to be asked for them."""
    if not ON_WINDOWS:
        return True
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes
        kernel = ctypes.windll.kernel32
        return bool(kernel.SetConsoleMode(kernel.GetStdHandle(-11), 7))
    return False


def colorize(text):
    r"""An outcome in its colour; any other text as it is.

    >>> colorize("FAIL "), colorize("odd")
    ('\x1b[31mFAIL \x1b[0m', 'odd')
    """
    code = COLOURS.get(text.strip())
    return text if code is None else f"\x1b[{code}m{text}\x1b[0m"


def character_width(character):
    import unicodedata
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def display_width(text):
    """Columns of a terminal that a text takes.

    >>> display_width("abc"), display_width("\u6e2c\u8a66")
    (3, 4)
    """
    if max(text, default="") < "\u0300":
        return len(text)
    return sum(map(character_width, text))


def truncate(text, width):
    """Text in exactly so many columns, cut with ... where it is longer.

    >>> truncate("PSU-A-99", 10), truncate("PSU-A-99", 6)
    ('PSU-A-99  ', 'PSU...')
    """
    taken = display_width(text)
    if taken > width:
        end = taken = 0
        for character in text:      # from the front: a long text costs no more than its cut
            taken += character_width(character)
            if taken > width - 3:
                break
            end += 1
        text = (text[:end] + "...")[:width]
        taken = display_width(text)
    return text + " " * (width - taken)


def column_widths(lines, columns, width, keep_all=False):
    """[(number of a column, its width)] of a table on a terminal, the columns that find room."""
    need = []
    for texts in zip(*lines):
        longest = max(map(display_width, texts))
        need.append(longest)
    kept = list(range(len(columns)))
    if not keep_all:
        drop_columns(kept, need, columns, width)
    share_room(kept, need, columns, width)
    return [(i, need[i]) for i in kept]


def drop_columns(kept, need, columns, width):
    """Drops the least important columns (the last of equal ones) until the others find room."""
    def importance(i):
        column = columns[i]
        return column.importance, -i

    while len(kept) > 1:
        least = least_width(kept, need, columns)
        if least < width:
            return
        dropped = min(kept, key=importance)
        kept.remove(dropped)


def share_room(kept, need, columns, width):
    """Narrows the shared columns; what the short ones leave goes to the long ones."""
    gaps = 2 * (len(kept) - 1)
    free = width - 1 - gaps
    shared = []
    for i in kept:
        if columns[i].kind == "fixed":
            free -= need[i]
        else:
            shared.append(i)
    shared.sort(key=need.__getitem__)
    while shared:
        share = free // len(shared)
        most = max(LEAST_WIDTH, share)
        i = shared.pop(0)
        need[i] = min(need[i], most)
        free -= need[i]


def least_width(kept, need, columns):
    """Columns of the terminal that these columns of a table take at least."""
    has_extra = any(columns[i].kind == "extra" for i in kept)
    total = 2 * (len(kept) - 1)
    for i in kept:
        can_shrink = columns[i].kind == "shared" and not has_extra
        total += min(need[i], LEAST_WIDTH) if can_shrink else need[i]
    return total


def format_cell(value, path, is_terminal):
    """A value in a table: as people write it on a terminal, whole and in UTC in a pipe."""
    if value is None:
        return "-" if is_terminal else ""
    if path.endswith("_at"):
        at = epoch(value)
        if at is not None:
            return ago(time.time() - at) if is_terminal else utc_text(value)
    if is_terminal and path.endswith("client_run_ref"):
        return printable(value)[:12]
    if is_terminal and path.endswith("duration"):
        return duration_text(value)
    return printable(value)


def ago(seconds):
    """How long ago, or in how long.

    >>> ago(150), ago(7200), ago(-300)
    ('2m ago', '2h ago', 'in 5m')
    """
    size = abs(seconds)
    unit = "s"
    for longer in "mhd":
        if size >= 2 * _SECONDS[longer]:
            unit = longer
    text = f"{int(size // _SECONDS[unit])}{unit}"
    return f"{text} ago" if seconds >= 0 else f"in {text}"


def csv_text(value):
    """A cell of a CSV file that no spreadsheet takes for a formula.

    >>> csv_text("-12.5"), csv_text("=1+1"), csv_text({"a": 1})
    ('-12.5', "'=1+1", '{"a": 1}')
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return printable(value)
    text = printable(value, keep="\t\n")
    if re.match("[\t\r\n]|\\s*[-=+@\uff1d\uff0b\uff0d\uff20]", value):
        try:
            float(value)
        except ValueError:
            return "'" + text
    return text


def series_length(row):
    """How many points the series of a measurement have, or None where it has none."""
    series = only_dicts(row.get("data_series"))
    if not series:
        return None
    longest = 0
    for part in series:
        data = part.get("data")
        if isinstance(data, list):
            longest = max(longest, len(data))
    return longest


def attempt_of(phase):
    """1 for the first try of a phase."""
    retries = phase.get("retry_count")
    return retries + 1 if is_number(retries) else 1


def expressions_of(row):
    """The expressions of the validators of a measurement, a series or an aggregation."""
    rules = only_dicts(row.get("validators"))
    return ", ".join(printable(rule.get("expression"), 200) for rule in rules)


def measurement_rows(run, with_points=False):
    """A dict with MEASUREMENT_COLUMNS for each measurement of a run.

    The value of a series is the number of its points, or with_points the lists of them.
    """
    rows = []
    for phase in only_dicts(run.get("phases")):
        for row in only_dicts(phase.get("measurements")):
            length = series_length(row)
            value = row.get("measured_value")
            if length is not None:
                value = f"{length} points"
                if with_points:
                    value = [part.get("data") for part in only_dicts(row["data_series"])]
            rows.append({
                "run_id": run.get("id"), "serial_number": get_path(run, "unit.serial_number"),
                "procedure": get_path(run, "procedure.name"),
                "started_at": run.get("started_at"), "phase": phase.get("name"),
                "attempt": attempt_of(phase), "name": row.get("name"), "value": value,
                "units": row.get("units"), "limits": expressions_of(row),
                "outcome": row.get("outcome")})
    return rows


_SHEET_NAMESPACE = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_CONTENT_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_STYLES = (
    f'{_XML}<styleSheet xmlns="{_SHEET_NAMESPACE}">'
    '<numFmts count="1"><numFmt numFmtId="164" formatCode="yyyy\\-mm\\-dd\\ hh:mm:ss"/></numFmts>'
    '<fonts count="2"><font><sz val="11"/><name val="Calibri"/></font>'
    '<font><b/><sz val="11"/><name val="Calibri"/></font></fonts>'
    '<fills count="2"><fill><patternFill patternType="none"/></fill>'
    '<fill><patternFill patternType="gray125"/></fill></fills>'
    '<borders count="1"><border><left/><right/><top/><bottom/><diagonal/></border></borders>'
    '<cellStyleXfs count="1"><xf numFmtId="0" fontId="0" fillId="0" borderId="0"/></cellStyleXfs>'
    '<cellXfs count="3"><xf numFmtId="0" fontId="0" fillId="0" borderId="0" xfId="0"/>'
    '<xf numFmtId="0" fontId="1" fillId="0" borderId="0" xfId="0" applyFont="1"/>'
    '<xf numFmtId="164" fontId="0" fillId="0" borderId="0" xfId="0" applyNumberFormat="1"/>'
    '</cellXfs><cellStyles count="1"><cellStyle name="Normal" xfId="0" builtinId="0"/>'
    '</cellStyles></styleSheet>')
_HEADER_STYLE, _DATE_STYLE = 1, 2


class Workbook:
    """A workbook (.xlsx) written as a stream: the memory it takes does not grow with its rows.

    After WORKBOOK_ROWS rows it goes on in another sheet. Used in `with`: a block that fails leaves
    a file that no program takes for a workbook.
    """

    def __init__(self, stream, paths):
        import zipfile
        self.archive = zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED)
        self.paths = paths
        self.sheets = 0
        self.rows = 0
        self.entry = None
        self.open_sheet()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        is_whole = False
        try:
            if kind is None:
                self.close_sheet()
                self.write_parts()
                self.archive.close()
                is_whole = True
        finally:
            if not is_whole:
                self.give_up()

    def give_up(self):
        """Ends without a complaint; destructors would write on, and print a traceback."""
        with contextlib.suppress(Exception):    # the first error is told
            self.entry.close()
        with contextlib.suppress(Exception):
            self.archive.close()
        self.archive.fp = None

    def open_sheet(self):
        self.sheets += 1
        self.rows = 1
        self.entry = self.archive.open(f"xl/worksheets/sheet{self.sheets}.xml", "w")
        header = "".join(text_cell(path, _HEADER_STYLE) for path in self.paths)
        columns = f'<cols><col min="1" max="{len(self.paths)}" width="20" customWidth="1"/></cols>'
        self.put(f'{_XML}<worksheet xmlns="{_SHEET_NAMESPACE}"><sheetViews><sheetView '
                 'workbookViewId="0"><pane ySplit="1" topLeftCell="A2" activePane="bottomLeft" '
                 f'state="frozen"/></sheetView></sheetViews>{columns if self.paths else ""}'
                 f'<sheetData><row>{header}</row>')

    def close_sheet(self):
        self.put("</sheetData></worksheet>")
        self.entry.close()

    def put(self, xml):
        self.entry.write(xml.encode("utf-8"))

    def write(self, values):
        """Writes a row, a value for each path."""
        if self.rows == WORKBOOK_ROWS:
            self.close_sheet()
            self.open_sheet()
        self.rows += 1
        cells = [workbook_cell(value, path) for value, path in zip(values, self.paths)]
        self.put(f"<row>{''.join(cells)}</row>")

    def write_parts(self):
        """Writes what names the sheets."""
        sheets, relations, types = "", "", ""
        for number in range(1, self.sheets + 1):
            name = "runs" if number == 1 else f"runs {number}"
            sheets += f'<sheet name="{name}" sheetId="{number}" r:id="rId{number}"/>'
            relations += relation(f"rId{number}", "worksheet", f"worksheets/sheet{number}.xml")
            types += part_type(f"/xl/worksheets/sheet{number}.xml", "worksheet")
        relations += relation("rIdStyles", "styles", "styles.xml")
        types += part_type("/xl/workbook.xml", "sheet.main") + part_type("/xl/styles.xml", "styles")
        document = relation("rId1", "officeDocument", "xl/workbook.xml")
        parts = {
            "xl/styles.xml": _STYLES,
            "xl/workbook.xml": f'{_XML}<workbook xmlns="{_SHEET_NAMESPACE}" '
                               f'xmlns:r="{_RELATION}"><sheets>{sheets}</sheets></workbook>',
            "xl/_rels/workbook.xml.rels": relations_part(relations),
            "_rels/.rels": relations_part(document),
            "[Content_Types].xml":
                f'{_XML}<Types xmlns="{_PACKAGE}/content-types"><Default Extension="rels" '
                'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
                f'<Default Extension="xml" ContentType="application/xml"/>{types}</Types>'}
        for name, text in parts.items():
            self.archive.writestr(name, text.encode("utf-8"))


def relation(id, kind, target):
    return f'<Relationship Id="{id}" Type="{_RELATION}/{kind}" Target="{target}"/>'


def relations_part(relations):
    return f'{_XML}<Relationships xmlns="{_PACKAGE}/relationships">{relations}</Relationships>'


def part_type(path, kind):
    return f'<Override PartName="{path}" ContentType="{_CONTENT_TYPE}.{kind}+xml"/>'


def workbook_cell(value, path):
    """A value as the XML of a cell: numbers, times and durations as such, all else as text.

    >>> workbook_cell(1.5, "x"), workbook_cell("PT1M", "duration"), workbook_cell(None, "x")
    ('<c><v>1.5</v></c>', '<c><v>60.0</v></c>', '<c/>')
    """
    if value is None:
        return "<c/>"
    if isinstance(value, bool):
        return f'<c t="b"><v>{int(value)}</v></c>'
    if is_number(value):
        is_exact = isinstance(value, float) or abs(value) < 10 ** 15
        if is_exact and math.isfinite(value):
            return f"<c><v>{value!r}</v></c>"
    if path.endswith("_at"):
        day = workbook_day(value)
        if day is not None:
            return f'<c s="{_DATE_STYLE}"><v>{day!r}</v></c>'
    if path.endswith("duration"):
        seconds = duration_seconds(value)
        if seconds is not None:
            return f"<c><v>{float(seconds)!r}</v></c>"
    return text_cell(value)


def text_cell(value, style=0):
    r"""A text as the XML of a cell. What XML cannot hold is escaped.

    >>> text_cell("a<b")
    '<c s="0" t="inlineStr"><is><t xml:space="preserve">a&lt;b</t></is></c>'
    """
    text = value if isinstance(value, str) else json_text(value)
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]",
                  lambda match: printable(match.group()), text)
    if len(text) > WORKBOOK_TEXT:
        text = text[:WORKBOOK_TEXT - 3] + "..."
    text = re.sub("_(?=x[0-9A-Fa-f]{4}_)", "_x005F_", text)     # a spreadsheet would decode it
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<c s="{style}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def local_time(text):
    """A time with offset as a datetime of this machine's local time, or None."""
    at = epoch(text)
    if at is None:
        return None
    try:
        return datetime.datetime.fromtimestamp(at, _UTC).astimezone()
    except (OSError, OverflowError, ValueError):
        return None


def workbook_day(text):
    """Days since 1899-12-30 in local time, as workbooks count them, or None.

    Before March 1900 programs differ by a day.
    """
    local = local_time(text)
    if local is None or local.year <= 1900:
        return None
    past = local.replace(tzinfo=None) - datetime.datetime(1899, 12, 30)
    return round(past.total_seconds() / 86400, 9)


# ---- report --------------------------------------------------------------------------------------

QUOTES = "\"'"      # what a text in an expression begins with


def run_report(run, screen, link, failed_only, show_logs):
    """The lines of a run for people: verdict, unit, times, phases, measurements, files, logs."""
    yield verdict_line(run, screen)
    yield ""
    for title, value in header_fields(run, screen):
        if value:
            yield f"{title:<10} {value}"
    if link:
        yield f"{'Link':<10} {link}"
    phases = only_dicts(run.get("phases"))
    yield from phase_lines(phases, screen, failed_only)
    yield from attachment_lines(only_dicts(run.get("attachments")))
    yield from sub_unit_lines(only_dicts(run.get("sub_units")))
    yield from log_lines(only_dicts(run.get("logs")), screen, show_logs)


def verdict_line(run, screen):
    """Outcome, unit, procedure, start and duration of a run."""
    outcome = field_text(run, "outcome")
    version = field_text(run, "procedure.version.tag", " ")
    started = time_text(run, "started_at", screen)
    facts = [
        screen.paint(outcome),
        field_text(run, "unit.serial_number"),
        field_text(run, "procedure.name") + version,
        started[:26].partition(" (")[0],
        duration_text(run.get("duration")),
    ]
    return "  ".join(fact for fact in facts if fact)


def attachment_lines(rows):
    lines = []
    for row in rows:
        name = printable(row.get("name"))
        size = size_text(row.get("size"))
        id = printable(row.get("id"))
        lines.append(f"{name}  {size}  {id}")
    return section(f"ATTACHMENTS  {len(lines)}", lines)


def sub_unit_lines(rows):
    lines = []
    for row in rows:
        serial_number = printable(row.get("serial_number"))
        part_number = printable(row.get("part_number"))
        lines.append(f"{serial_number}  ({part_number})")
    return section(f"SUB-UNITS    {len(lines)}", lines)


def field_text(run, path, before=""):
    """A field as text, with something before it where there is one."""
    value = get_path(run, path)
    return "" if value in (None, "") else before + printable(value)


def local_text(local, precision):
    """A local time as people read it: its offset stands apart. `precision` is isoformat's."""
    text = local.isoformat(" ", precision)
    begin = local.replace(tzinfo=None).isoformat(" ", precision)
    return f"{begin} {text[len(begin):]}"


def time_text(run, name, screen):
    """A time: in local time with its offset on a terminal, in UTC elsewhere."""
    at = epoch(run.get(name))
    if at is None:
        return field_text(run, name)
    local = local_time(run[name])
    if not screen.tty or local is None:
        return utc_text(run[name])
    age = ago(time.time() - at)
    return f"{local_text(local, 'seconds')} ({age})"


def header_fields(run, screen):
    """(title, text) of what a report begins with; an empty text is not shown."""
    return [
        ("Run", field_text(run, "id")),
        ("Unit", unit_text(run)),
        ("Station", field_text(run, "created_by_station.name")),
        ("User", first_text(run, "created_by_user.name", "created_by_user.email")),
        ("Operator", first_text(run, "operated_by.name", "operated_by.email")),
        ("Slot", first_text(run, "slot_name", "slot_key")),
        ("Started", time_text(run, "started_at", screen)),
        ("Ended", time_text(run, "ended_at", screen)),
        ("Uploaded", time_text(run, "created_at", screen)),
        ("Note", field_text(run, "docstring")),
        ("Metadata", metadata_text(run.get("metadata"))),
    ]


def unit_text(run):
    """Serial number, part, revision, batch and sample of a unit."""
    text = field_text(run, "unit.serial_number")
    text += field_text(run, "unit.part.number", "   part ")
    text += field_text(run, "unit.part.revision.number", "   rev ")
    text += field_text(run, "unit.batch.number", "   batch ")
    text += field_text(run, "unit.sample", "   sample ")
    return text


def metadata_text(metadata):
    if not isinstance(metadata, dict):
        return ""
    pairs = []
    for key, value in metadata.items():
        pairs.append(f"{printable(key)}={printable(value)}")
    return "  ".join(pairs)


def first_text(run, *paths):
    """The first of these fields that has a text."""
    for path in paths:
        text = field_text(run, path)
        if text:
            return text
    return ""


def section(title, lines):
    """A part of a report, none where it has no lines."""
    return ["", title] + ["  " + line for line in lines] if lines else []


def count_by(rows, key):
    """3: 2 PASS, 1 FAIL"""
    counts = collections.Counter()
    for row in rows:
        word = printable(row.get(key))
        counts[word] += 1
    words = [f"{count} {word}" for word, count in counts.items()]
    text = ", ".join(words)
    return f"{len(rows)}: {text}"


def log_time(row, screen):
    """The time of a log line: in local time with its offset on a terminal, as it is elsewhere."""
    local = local_time(row.get("timestamp"))
    if not screen.tty or local is None:
        return printable(row.get("timestamp"))
    return local_text(local, "milliseconds")


def log_lines(rows, screen, show_logs):
    title = "LOGS         " + count_by(rows, "level")
    if rows and not show_logs:
        return ["", title + "      (show them: --logs)"]
    lines = []
    for row in rows:
        when = log_time(row, screen)
        level = printable(row.get("level"))
        message = printable(row.get("message"))
        source = printable(row.get("source_file"))
        number = printable(row.get("line_number"))
        lines.append(f"{when}  {level:<8}  {message}  ({source}:{number})")
    return section(title, lines)


def phase_lines(phases, screen, failed_only):
    lines = []
    for phase in phases:
        rows = only_dicts(phase.get("measurements"))
        if failed_only:
            rows = [row for row in rows if row.get("outcome") == "FAIL"]
            if not rows and phase.get("outcome") in ("PASS", "SKIP"):
                continue
        lines.append(phase_line(phase, screen))
        lines += note_lines(phase)
        names = [printable(row.get("name")) for row in rows]
        width = max(map(display_width, names), default=0)
        for row in rows:
            lines += measurement_lines(row, screen, min(width, 28))
    return section("PHASES  " + count_by(phases, "outcome"), lines)


def phase_line(phase, screen):
    """Verdict, name, attempt and duration of a phase."""
    room = 58
    if screen.width:
        room = max(20, min(58, screen.width - 19))
    name = printable(phase.get("name"))
    attempt = attempt_of(phase)
    if attempt != 1:
        name += f"  (attempt {attempt})"
    word = truncate(printable(phase.get("outcome")), 5)
    outcome = screen.paint(word)
    took = duration_text(phase.get("duration"))
    return f"{outcome} {truncate(name, room)}{took:>9}".rstrip()


def note_lines(phase):
    """The first paragraph of the note of a phase that did not pass: test programs say there why."""
    note = phase.get("docstring")
    if note in (None, "") or phase.get("outcome") == "PASS":
        return []
    text = printable(note, 1000, keep="\n\t").strip()
    words = text.partition("\n\n")[0].split()
    text = truncate(" ".join(words), 200).rstrip()
    return [f"  note: {text}"]


def measurement_lines(row, screen, width):
    """A measurement: verdict, name, value, limits and what failed; then its series and
    aggregations, a line each."""
    series = only_dicts(row.get("data_series"))
    value = row.get("measured_value")
    units = row.get("units")
    text = ""
    if series:
        text = f"{series_length(row)} points"
    elif value is not None:
        text = printable(json_text(value), 60)
        text += field_text(row, "units", " ")
    name = printable(row.get("name"))
    name += " " * (width - display_width(name))
    word = truncate(printable(row.get("outcome")), 5)
    outcome = screen.paint(word)
    limits = limits_text(row, units)
    failure = failure_text(row)
    lines = [f"  {outcome} {name}  {text:<15} {limits}{failure}".rstrip()]
    indent = " " * 10
    for line in aggregation_lines(row):
        lines.append(indent + line)
    for part in series:
        text = series_text(part)
        lines.append(indent + text)
        for line in aggregation_lines(part):
            lines.append(f"{indent}  {line}")
    return lines


def series_text(part):
    """Name and units of a series, its smallest, largest and last value, its limits."""
    facts = [
        field_text(part, "name"),
        field_text(part, "units"),
    ]
    data = part.get("data")
    if not isinstance(data, list):
        data = []
    numbers = list(filter(is_measurable, data))
    if numbers:
        smallest = min(numbers)
        largest = max(numbers)
        last = numbers[-1]
        facts.append(f"min {smallest:.6g}  max {largest:.6g}  last {last:.6g}")
    limits = limits_text(part, part.get("units"))
    facts.append(limits)
    return "  ".join(fact for fact in facts if fact)


def aggregation_lines(source):
    lines = []
    for item in only_dicts(source.get("aggregations")):
        limits = limits_text(item, item.get("unit"))
        kind = printable(item.get("type"))
        value = printable(item.get("value"))
        text = f"{kind} {value}"
        lines.append(f"{text} ({limits})" if limits else text)
    return lines


def limits_text(row, units):
    """Limits as people write them; one that fails without deciding is a WARN.

    >>> limits_text({"validators": [{"expression": "x >= 3.1"}, {"expression": "x <= 3.4"}]}, "V")
    '3.1 to 3.4 V'
    """
    rules = only_dicts(row.get("validators"))
    bounds = [plain_bound(rule) for rule in rules]
    suffix = "" if units in (None, "") else " " + printable(units)
    warning = " WARN" if any(map(is_warning, rules)) else ""
    if len(rules) == 1 and bounds[0]:
        operator, limit = bounds[0]
        if limit[0] in QUOTES:      # a text has no unit
            suffix = ""
        return f"{operator} {limit}{suffix}{warning}"
    if len(rules) == 2 and all(bounds):
        by_operator = dict(bounds)
        low = by_operator.get(">=")
        high = by_operator.get("<=")
        if low and high:
            return f"{low} to {high}{suffix}{warning}"
    words = []
    for rule in rules:
        word = printable(rule.get("expression"), 60)
        words.append(word + " WARN" if is_warning(rule) else word)
    return ", ".join(words)


def is_warning(rule):
    """Whether a validator failed that does not decide."""
    return rule.get("outcome") == "FAIL" and rule.get("is_decisive") is False


def plain_bound(rule):
    """(operator, limit) of an expression such as x >= 3.1 or x == "1.4.0", else None."""
    expression = rule.get("expression")
    if not isinstance(expression, str) or len(expression) > 80 or not expression.isprintable():
        return None
    number = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
    match = re.fullmatch(rf"""x (>=|<=|==|!=|>|<) ({number}|[Tt]rue|[Ff]alse|"[^"]*"|'[^']*')""",
                         expression)
    return match.groups() if match else None


def failure_text(row):
    """  <-- 0.9 below, for the nearest numeric limit that failed; else what was expected."""
    value = row.get("measured_value")
    distances, expected = [], []
    for rule in only_dicts(row.get("validators")):
        limit = rule.get("expected_value")
        if rule.get("outcome") != "FAIL" or limit is None:
            continue
        limits = limit if isinstance(limit, list) else [limit]
        if limits and all(map(is_measurable, [value] + limits)):
            distances += [distance_to(item, value) for item in limits]
        else:
            expected.append(printable(json_text(limit), 60))
    if distances:
        distance, direction = min(distances)
        if distance:
            return f"   <-- {distance:.4g} {direction}"
    if expected:
        return "   <-- expected " + ", ".join(expected)
    return "   <-- failed" if row.get("outcome") == "FAIL" else ""


def distance_to(limit, value):
    """(how far, below or above) a value is from a limit."""
    direction = "below" if value < limit else "above"
    return abs(value - limit), direction


def is_measurable(value):
    """Whether it is a number that a float can hold: JSON has larger ones."""
    return is_number(value) and abs(value) < 1e300


class UnitHistory:
    """First and last verdict of one unit of a procedure."""

    def __init__(self):
        self.first = self.last = None       # (start in seconds, whether it passed)

    def add(self, started_at, passed):
        """One run; of two that start together the one added first is the later, as lists are."""
        if self.first is None or started_at <= self.first[0]:
            self.first = (started_at, passed)
        if self.last is None or started_at > self.last[0]:
            self.last = (started_at, passed)


def summarize(runs):
    """(document, lines) of runs: a count for each outcome, yields, the serials that fail most."""
    outcomes, failures = collections.Counter(), collections.Counter()
    names = {}      # of the procedures, by ID
    units = {}      # for each procedure a UnitHistory for each serial number
    for run in runs:
        outcome = printable(run.get("outcome"))
        serial = printable(get_path(run, "unit.serial_number"))
        procedure = printable(get_path(run, "procedure.id"))
        name = printable(get_path(run, "procedure.name"))
        names.setdefault(procedure, name)
        outcomes[outcome] += 1
        if outcome != "PASS":
            failures[serial] += 1
        histories = units.setdefault(procedure, {})
        history = histories.setdefault(serial, UnitHistory())
        started_at = epoch(run.get("started_at")) or 0
        history.add(started_at, outcome == "PASS")
    procedures = []
    for id, histories in units.items():
        procedures.append(procedure_row(id, names[id], histories.values()))
    worst = []
    for serial, count in failures.most_common(10):
        worst.append({"serial_number": serial, "count": count})
    document = {
        "runs": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "procedures": procedures,
        "failing_serials": worst,
    }
    return document, summary_lines(document)


def procedure_row(id, name, histories):
    """What the summary says of a procedure."""
    count = len(histories)
    passed = passed_first = 0
    for history in histories:
        passed += history.last[1]
        passed_first += history.first[1]
    return {
        "id": id,
        "procedure": name,
        "units": count,
        "passed": passed,
        "passed_first": passed_first,
        "yield": passed / count,
        "first_pass_yield": passed_first / count,
    }


def summary_lines(document):
    total = document["runs"]
    lines = [counted(total, "run")]
    for outcome, count in document["outcomes"].items():
        part = count / total
        bar = "#" * round(40 * part)
        percent = 100 * part
        lines.append(f"  {outcome:<8} {count:>7}  {percent:5.1f} %  {bar}")
    table = []
    for row in document["procedures"]:
        name = truncate(row["procedure"], 26)
        first = row["first_pass_yield"]
        table.append(f"{name} {row['units']:>6} {row['yield']:7.1%} {first:10.1%}")
    if table:
        table.insert(0, "PROCEDURE                   UNITS   YIELD  FIRST PASS")
        table.append("yield: units whose last run here passed")
        table.append("first pass: units whose first run here passed")
    lines += section("YIELD", table)
    worst = []
    for row in document["failing_serials"]:
        worst.append(f"{row['count']:>5}  {row['serial_number']}")
    return lines + section("SERIALS THAT FAIL MOST", worst)


# ---- commands ------------------------------------------------------------------------------------

class Console:
    """What a command says beside its result: notes and progress on stderr, a log on stdout.

    Nothing here fails: a closed or full stream must not change what a command does.
    """

    def __init__(self, format, is_quiet, is_verbose):
        self.is_silent = format == "json" and not is_verbose
        self.is_logging = format == "table" and not is_quiet
        self.is_quiet = is_quiet
        self.progress_started = None

    def note(self, text):
        """A line on stderr."""
        if not self.is_silent:
            with contextlib.suppress(OSError, ValueError):
                print(printable(text), file=sys.stderr, flush=True)

    def warn(self, text):
        for line in text.split("\n"):
            self.note("warning: " + line)

    def log(self, text):
        """A line with the time on stdout, while queue send is at work."""
        if self.is_logging:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {printable(text)}\n"
            try:
                sys.stdout.write(line)
                sys.stdout.flush()
            except (OSError, ValueError):
                drop_stdout()

    def progress_line(self, text, is_last):
        """A line on a terminal that is written over, once a command takes more than 2 s."""
        if self.progress_started is None:
            self.progress_started = time.monotonic()
        is_late = time.monotonic() - self.progress_started > 2
        if is_late and isatty(sys.stderr) and not self.is_silent:
            with contextlib.suppress(OSError, ValueError):
                print(f"\r{text}  ", end="\n" if is_last else "", file=sys.stderr, flush=True)

    def show_upload(self, file, sent):
        name = printable(file.name, 40)
        percent = 100 * sent // file.size
        sizes = f"{size_text(sent)} of {size_text(file.size)}"
        self.progress_line(f"Uploading {name} {percent:3d}%  {sizes}", sent == file.size)


class Arguments:
    """The flags and plain words of one command line, and the files that they name."""

    def __init__(self, flags, words, fields):
        self.flags = flags
        self.words = words
        self.fields = {field.name: field for field in fields}
        self.stdin_flag = None      # the flag that has read stdin

    def get(self, name):
        """The checked value of a flag that is no part of a request, or None."""
        value, field = self.flags.get(name), self.fields.get(name)
        if value is None or field.kind == "flag":
            return value
        try:
            if field.many:
                return [field.check(item, field) for item in value]
            return field.check(value, field)
        except ValueError as error:
            raise BadInput(f"{flag_name(name)}: {error}") from None

    def read(self, word, name):
        """The bytes of @FILE, or of - (stdin), which stands once in a command; else the word."""
        if word == "-":
            if self.stdin_flag:
                raise BadInput("- (stdin) is given twice: "
                               f"{flag_name(self.stdin_flag)}, {flag_name(name)}",
                               "put one of them into a file: @FILE")
            self.stdin_flag = name
        elif not word.startswith("@"):
            return word
        try:
            if word == "-":
                return sys.stdin.buffer.read() if sys.stdin else b""
            with open(local_path(word[1:]), "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{flag_name(name)}: cannot read {word[1:] or 'stdin'}: {reason}",
                           "name a file that this user can read") from None

    def read_json(self, name):
        """The JSON of a flag: text, @FILE or -."""
        word = self.flags[name]
        data = self.read(word, name)
        if not data.strip():
            raise BadInput(f"{flag_name(name)}: is empty")
        try:
            return load_input_json(data)
        except ValueError as error:
            failure = BadInput(f"{flag_name(name)} is not JSON: {error}")
            if data is word:
                raise self.explain_json_word(failure, name, word) from None
            place = "stdin" if word == "-" else word[1:]
            raise failure.with_note(f"in {printable(place)}") from None

    def explain_json_word(self, failure, name, word):
        """Adds what arrived, and how JSON survives a shell, to an error about JSON in a word."""
        got = f"got: {printable(word, 60)}"
        if word[:1] in ("{", "[") and '"' not in word:
            if "'" not in word:
                got += "     (the shell removed the double quotes)"
        hint = f"put the JSON in a file: {flag_name(name)} @FILE"
        if name == "metadata" and "set" in self.fields:
            hint = "--set key=value, or " + hint
        elif name == "metadata":
            hint = f"such as {flag_name(name)} {self.fields[name].example}; or {hint}"
        if names_a_file(word) or word.endswith(".json"):
            hint = f"{flag_name(name)} @{word} reads the file"
        return failure.with_note(got, hint)

    def read_list(self, words, name):
        """The values in the words of a list flag; @FILE and - have one a line."""
        values = []
        for word in words:
            data = self.read(word, name)
            if data is word:
                values.append(word)
                continue
            try:
                text = decode_text(data)
                require("\0" not in text, "it holds a NUL character; save the file as UTF-8")
            except ValueError as error:
                path = word.lstrip("@")
                raise BadInput(f"{flag_name(name)}: {path}: {error}") from None
            values += [line.strip() for line in text.splitlines() if line.strip()]
        if words and not values:    # an empty filter would mean everything
            source = "stdin" if words[0] == "-" else printable(words[0], 60)
            raise BadInput(f"{flag_name(name)}: {source} is empty",
                           "where ls made the list, no run matched")
        return values

    def values(self, operation, start=()):
        """The operation's fields as given: JSON read, IDs from @FILE, --set among the metadata."""
        values = dict(start)
        for field in OPERATIONS[operation].fields:
            if self.flags.get(field.name) is None:
                continue
            if field.kind in JSON_KINDS:
                values[field.name] = self.read_json(field.name)
            elif field.many and field.kind in ("id", "serial"):
                values[field.name] = self.read_list(self.flags[field.name], field.name)
            elif field.name == "sub_units" and not any(self.flags["sub_units"]):
                values["sub_units"] = []
            elif field.many and field.kind == "enum":
                words = ",".join(self.flags[field.name]).split(",")
                values[field.name] = [word for word in words if word.strip()] or words
            else:
                values[field.name] = self.flags[field.name]
        self.add_metadata_words(values)
        return values

    def add_metadata_words(self, values):
        """Adds the keys of --set and --unset to the metadata."""
        changes = {}
        for word in self.flags.get("set") or ():
            key, equals, text = word.partition("=")
            if not key or not equals:
                raise BadInput(f"--set: {printable(word, 60)!r} is not key=value",
                               "without spaces, such as --set shift=A note='second try'")
            changes[key] = parse_word(text)
        given = ()
        if self.flags.get("metadata") and isinstance(values["metadata"], dict):
            given = values["metadata"]
        for key in self.flags.get("unset") or ():
            if key in changes or key in given:
                raise BadInput(f"--unset {key}: the same key is set", "give one of them")
            changes[key] = None
        if changes:
            metadata = values.get("metadata", {})
            if isinstance(metadata, dict):      # else the checks tell it
                values["metadata"] = dict(metadata, **changes)

    def examine(self, operation, start=()):
        """(the values of the operation as they go over the wire, Findings)."""
        wire, findings = examine(operation, self.values(operation, start))
        record = OPERATIONS[operation].record
        findings.problems = named_by_flags(findings.problems, record)
        return wire, findings

    def wire(self, operation):
        """The values of the operation as they go over the wire; BadInput with all problems."""
        wire, findings = self.examine(operation)
        if findings.problems:
            raise problems_error(findings.problems)
        return wire

    def read_key(self, warn):
        """The key in --api-key-file, None without that flag. No word is shown that may be a key."""
        path = self.get("api_key_file")
        if path is None:
            return None
        if path == "-":
            data = self.read(path, "api_key_file")
        else:
            shown = "the file"      # what is typed there may be the key itself
            folder = os.path.dirname(path)
            if folder.strip("/\\") and os.path.isdir(folder):
                shown = path
            try:
                with open(path, "rb") as file:      # so it is a file's name, and no key
                    warn_of_readers(path, os.fstat(file.fileno()), warn)
                    data = file.read(ERROR_LIMIT)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "the name is not valid"
                raise AccessDenied(f"--api-key-file: cannot read {shown}: {reason}",
                                   "name a file that holds the key, not the key") from None
        try:
            return decode_text(data)
        except ValueError:
            raise AccessDenied("--api-key-file: the file does not hold text",
                               "put the key alone into it") from None


class Call:
    """One command at work: its arguments, its console, and the Client, made when it is needed."""

    def __init__(self, name, arguments):
        self.name = name
        self.arguments = arguments
        self.get = arguments.get
        asked = self.format_asked()
        self.format = asked or self.format_of_name()
        self.is_quiet = bool(self.get("q"))
        self.console = Console(asked or "table", self.is_quiet, bool(self.get("v")))
        self.is_dry_run = bool(self.get("dry_run"))
        self.client_made = None
        self.queued_exit_code = None       # the exit status, once a run is in the queue

    def format_asked(self):
        """The form of the output that a flag asks for, or None."""
        return "json" if self.get("json") else self.get("format")

    def format_of_name(self):
        """The form of the output that the ending of --out says, else a table."""
        out = self.get("out") or ""
        ending = os.path.splitext(out)[1][1:].lower()
        if ending in ("xls", "ods"):
            stem = printable(out[:-4])
            raise BadInput(f"--out: no command writes .{ending}", f"write {stem}.xlsx")
        return ending if ending in FORMATS else "table"

    def client(self, retries=3):
        """The Client of this command, made once: one login, one set of connections.

        `retries`: how often it tries again where no flag says it.
        """
        if self.client_made is None:
            given = self.get("retries")
            path = self.get("api_key_file")
            self.client_made = Client(
                url=self.get("url"), api_key=self.arguments.read_key(self.console.warn),
                ca_cert=self.get("ca_cert"), timeout=self.get("timeout") or 30,
                retries=retries if given is None else given,
                allow_http=bool(self.get("allow_http")), source=f"--api-key-file {path}",
                notify=self.console.warn, trace=self.console.note if self.get("v") else None,
                transport=DryRun() if self.is_dry_run else None)
            self.client_made.waits = []
        return self.client_made

    def close(self):
        if self.client_made:
            self.client_made.close()

    def warn_of_zone(self):
        """Warns where local times are read and this machine does not know its time zone."""
        zone = unknown_time_zone()
        if zone:
            self.console.warn(f"TZ={zone} is a time zone that this machine does not know: local "
                              "times are taken as UTC. Give times with their offset")


def queue_path(call):
    return call.get("queue") or default_queue()


def queue_files(call):
    """The real paths of the queue of a command and of what lies beside it: nothing may replace one.

    The target of a move is a queue too.
    """
    paths = []
    with contextlib.suppress(BadInput):     # no home folder: no default queue
        path = queue_path(call)
        paths.append(path)
        if call.name == "queue move":
            for word in call.arguments.words:
                target = local_path(word)
                paths += [target, os.path.join(target, os.path.basename(path))]
    found = set()
    for path in paths:
        real_path = os.path.realpath(path)
        for ending in ("", "-journal", ".lock", ".storing"):
            found.add(real_path + ending)
    return found


def ask(call, question):
    """Asks on a terminal, and goes on elsewhere or with --yes."""
    if call.get("yes") or call.is_dry_run:
        return
    if isatty(sys.stdin) and isatty(sys.stderr):
        print(question, "This cannot be undone. Type y: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Stopped("nothing was deleted")


def run_ls(call):
    filters = call.arguments.wire("list")
    limit = filters.pop("limit", None)
    if limit and call.get("all"):
        raise BadInput("--limit and --all cannot be combined", "give one of them")
    wants_all = bool(call.get("all") or call.get("summary"))
    if not limit and not wants_all:
        limit = 50
    warn_of_filters(call, filters)
    include_asked_metadata(call, filters)
    page_size = call.get("page_size") or 100
    client = call.client()
    pages = client.pages(limit, page_size, **filters)
    first_page = next(pages)
    refuse_no_match(call, first_page)
    pages = tell_pages(call, first_page, pages, wants_all)
    if call.get("summary"):
        return summary_result(pages)
    return list_result(pages, filters)


def list_result(pages, filters):
    """The rows of a list, with metadata and sequences where they were asked for."""
    columns = list(RUN_COLUMNS)
    paths = list(RUN_CSV_COLUMNS)
    for name in ("metadata", "sequences"):
        if filters.get("include_" + name):
            title = name.upper()
            columns.append(Column(title, name, 4, "shared"))
            paths.append(name)
    return Result.pages(pages, columns, paths)


def summary_result(pages):
    runs = (run for rows, _ in pages for run in rows)
    document, lines = summarize(runs)
    rows = document["procedures"]
    return Result.text(document, lines, ids=(), rows=rows)


def warn_of_filters(call, filters):
    """Tells filters that no run can match, which would look as if there were none."""
    call.warn_of_zone()
    for name in ("ids", "procedure_ids", "serial_numbers", "part_numbers", "revision_numbers",
                 "batch_numbers"):
        if "," in "".join(filters.get(name, ())):
            words = name.replace("_", " ").replace("ids", "IDs")
            call.console.warn(f"no {words[:-1]} has a comma: separate {words} with spaces")
    for name in ("started", "ended", "created"):
        after = epoch(filters.get(f"{name}_after"))
        before = epoch(filters.get(f"{name}_before"))
        if after is not None and before is not None and after >= before:
            call.console.warn(f"--{name}-before is not later than --{name}-after: no run can match")


def include_asked_metadata(call, filters):
    """Asks for the metadata where --columns names it."""
    columns = call.get("columns") or ""
    words = re.split(r"[,.\s]", columns)
    if "metadata" in words:
        filters.setdefault("include_metadata", True)


def refuse_no_match(call, first_page):
    """NotFound with --fail-empty, where there is no run."""
    rows, _ = first_page
    if rows or call.is_dry_run:
        return
    if call.get("fail_empty"):
        raise NotFound("no run matches")


def tell_pages(call, first_page, pages, wants_all):
    """The pages of a list as they come; at the end, or where it breaks off, how to go on."""
    console = call.console
    count = len(first_page[0])
    meta = first_page[1]
    yield first_page
    try:
        for rows, meta in pages:
            count += len(rows)
            if wants_all and (call.get("out") or not isatty(sys.stdout)):
                console.progress_line(f"{count} runs", not meta.get("has_more"))
            yield rows, meta
    except Error as error:
        error.hint = f"{error.hint}\nto go on from here: --cursor {error.cursor}".lstrip()
        raise
    if not count and not call.is_quiet and not call.is_dry_run:
        console.note("no run matches")
    if meta.get("has_more") and not wants_all and not call.is_quiet:
        console.note(f"{count} shown, more exist: --all, or --cursor {meta['next_cursor']}")


def run_get(call):
    folder = call.get("download")
    if folder and os.path.exists(folder) and not os.path.isdir(folder):
        raise BadInput(f"--download: {printable(folder)} is a file",
                       "name a folder, such as --download evidence")
    client = call.client()
    serial_number = call.get("serial_number")
    if serial_number is not None:
        if call.arguments.flags.get("ids"):
            raise BadInput("an ID and --serial-number cannot be combined", "give one of them")
        rows = client.list(serial_numbers=[serial_number], limit=1)["data"]
        if not rows and not call.is_dry_run:
            shown = printable(serial_number, 80)
            raise NotFound(f"no run of the unit {shown}",
                           f"{PROG} ls --search-query {shown} finds a part of a serial number")
        ids = [row["id"] for row in rows]
    elif call.arguments.flags.get("ids"):
        ids = call.arguments.wire("delete")["ids"]
    else:
        raise BadInput("a run ID is missing",
                       f"{PROG} get RUN_ID, or get --serial-number SN-0001")
    reader = RunReader(call, client, ids)
    is_single = len(ids) == 1
    if is_single:
        reader.only = reader.fetch(ids[0])
    result = Result.runs(reader.runs(), reader.lines, single=is_single,
                         exit_code=reader.exit_code)
    result.error = reader.error
    result.failed_only = bool(call.get("failed_only"))
    return result


class RunReader:
    """Gets runs one after the other, saves their attachments, and remembers what failed."""

    def __init__(self, call, client, ids):
        self.call = call
        self.client = client
        self.ids = ids
        self.only = None        # the run, where one was asked for and is fetched already
        self.saved = []         # paths of the attachments of the run at hand
        self.missing = []       # IDs of runs that are not there
        self.failures = []      # of attachments
        self.all_passed = True

    def fetch(self, id):
        run = self.client.get(id)
        self.all_passed = self.all_passed and run.get("outcome") == "PASS"
        self.save_attachments(run)
        return run

    def runs(self):
        remaining = self.ids
        if self.only is not None:
            yield self.only
            remaining = ()
        for id in remaining:
            try:
                run = self.fetch(id)
            except NotFound:
                self.missing.append(id)
                continue
            yield run

    def save_attachments(self, run):
        """Saves all attachments that can be saved; what fails is told at the end."""
        folder = self.call.get("download")
        self.saved = []
        for row in only_dicts(run.get("attachments")) if folder else ():
            if not row.get("download_url"):
                self.call.console.warn(f"{printable(row.get('name'))} has no content: its upload "
                                       "was not finished")
                continue
            try:
                self.saved.append(printable(download(self.client, row, folder)))
            except Error as error:
                self.failures.append(error)

    def lines(self, run, screen):
        link = run_link(self.client, get_path(run, "procedure.id"), run.get("id"))
        yield from run_report(run, screen, link, bool(self.call.get("failed_only")),
                              bool(self.call.get("logs")))
        yield from section("SAVED", self.saved)

    def error(self):
        """The Error that tells what is missing, or None."""
        if self.missing:
            shown = ", ".join(printable(id, 80) for id in self.missing[:10])
            total = counted(len(self.ids), "run")
            return NotFound(f"{len(self.missing)} of {total} not there: {shown}",
                            "copy whole IDs; ls -q prints bare IDs")
        if self.failures:
            error = self.failures[0]
            if len(self.failures) > 1:
                error.with_note(f"{len(self.failures)} attachments were not saved")
            return error
        return None

    def exit_code(self):
        return 10 if self.call.get("exit_status") and not self.all_passed else 0


def run_link(client, procedure_id, run_id):
    """The run's page, where the organization is known from the credentials file, or None."""
    if not client.login.slug or not procedure_id:
        return None
    organization = f"{client.login.url}/{client.login.slug}"
    return printable(f"{organization}/{procedure_id}/runs/{run_id}")


def examine_create(call, start=None):
    """(the request as it goes over the wire, Findings) of the flags of a create.

    `start`: a request whose fields the flags override; --body replaces it.
    """
    if call.arguments.flags.get("body"):
        start = call.arguments.read_json("body")
        if not isinstance(start, dict):
            raise BadInput("--body: must be a JSON object")
    values = call.arguments.values("create", start or {})
    read_relative_times(values)
    wire, findings = examine("create", values)
    # A field is named by its flag unless it came with --body or from the queue.
    given = [name for name in values if name in call.arguments.flags]
    top_level = Record(*[field for field in CREATE.fields
                         if field.name in given or field.name not in values])
    findings.problems = named_by_flags(findings.problems, top_level)
    warn_of_create(call, wire, findings)
    if not any(name in values for name in REQUIRED):
        missing = BadInput("--outcome, --procedure-id, --serial-number, --started-at and "
                           "--ended-at are missing")
        if values:
            missing = problems_error(findings.problems)
        missing.hint = f"{PROG} create --help; create --example prints a whole run"
        raise missing
    return wire, findings


def read_relative_times(values):
    """Makes whole times of now, 24h, today and bare dates, if the run has a ref of its own.

    Without one they would make another run of each repetition: BadInput.
    """
    now = datetime.datetime.now().astimezone()
    for name in ("started_at", "ended_at"):
        value = values.get(name)
        if not isinstance(value, str) or not is_relative_time(value):
            continue
        if not values.get("client_run_ref"):
            why = "would make each repetition another run"
            if re.fullmatch(_DATE, value.strip()):
                why = "has no time of day"
            raise BadInput(f"{flag_name(name)}: {value} {why}",
                           "give the whole time, such as 2026-05-19T08:00:00, or a "
                           "--client-run-ref of your own")
        with contextlib.suppress(ValueError):       # the checks tell what is wrong with it
            values[name] = parse_when(value, now)


def warn_of_commas(call):
    """Tells words of --set that are text, or one key, because of a comma."""
    for word in call.arguments.flags.get("set") or ():
        key, _, value = word.partition("=")
        start = f"--set {printable(word, 60)}"
        if re.fullmatch(r"[+-]?\d+,\d+", value):
            number = value.replace(",", ".")
            call.console.warn(f"{start} is text; a number has a point: {printable(key)}={number}")
        elif re.search(r",\s*[\w.:+-]+=", value):
            call.console.warn(f"{start} is one key; several are separated by spaces")


def warn_of_create(call, wire, findings):
    call.warn_of_zone()
    warn_of_commas(call)
    end = epoch(wire.get("ended_at"))
    if end is not None and end > time.time() + 3600:
        call.console.warn(f"the run ends in the future, {wire['ended_at']}: is this machine's "
                          "clock right?")
    for warning in group_issues(findings.warnings):
        call.console.warn(warning)


def attached_paths(call):
    """The paths of --attach; two of one name are BadInput, as their names tell files apart.

    The queue file itself is none that can be attached.
    """
    paths = []
    for word in call.arguments.flags.get("attach") or ():
        path = local_path(word)
        found = [path]
        if ON_WINDOWS and re.search(r"[*?]", path):     # elsewhere the shell expands them
            import glob
            found = sorted(glob.glob(path)) or found
        paths += found
    names = collections.Counter(os.path.basename(path) for path in paths)
    for name, count in names.items():
        if count > 1:
            raise BadInput(f"--attach: {name} is given twice",
                           "rename one file: on a run its name tells it from the others")
    for path in paths:
        if os.path.realpath(path) in queue_files(call):
            raise BadInput(f"--attach: {path} is the queue itself")
    return paths


def create_now(call, body, files):
    """Sends a create directly, and attaches its files."""
    client = call.client()
    started = time.monotonic()
    try:
        run_id = client.send_create(body)["id"]
    except Unavailable as error:
        if not error.maybe_sent:
            error.hint += "\nto keep runs meanwhile, add --queue FILE"
        elif not client.ref_is_known:
            error.hint += ("\nunless the server is older than September 2026: then look first, "
                           f"with ls --serial-numbers {printable(body['serial_number'], 80)}")
        raise
    title = "Created run"
    if was_there(call, client, run_id, time.monotonic() - started):
        title = "Already there: run"
    document = {"id": run_id}
    lines = created_lines(client, body, run_id, title)
    try:
        lines += ["  " + line for line in attach_lines(call, client, run_id, files)]
    except KeyboardInterrupt as stopped:
        stopped.id = run_id
        raise
    except Error as error:
        raise attachments_missing(error, run_id, files) from None
    if files:
        document["attachments"] = [{"id": file.upload_id, "name": file.name} for file in files]
    return Result.text(document, lines)


def was_there(call, client, run_id, took):
    """Whether a run is older than the create that got its ID. Asked for people only."""
    clock = client.transport.server_clock
    if call.format != "table" or call.is_quiet or clock is None:
        return False
    try:
        rows = client.list(ids=[run_id], limit=1)["data"]
    except Error:
        return False        # the run is stored, and only this is not known
    stored_at = epoch(rows[0].get("created_at")) if rows else None
    return stored_at is not None and stored_at < clock[0] - took - 0.25


def attachments_missing(error, run_id, files):
    """The error of a create whose run is stored and whose files are not all there."""
    missing = [file.name for file in files if not file.done] or [file.name for file in files]
    names = ", ".join(missing)
    error.message = (f"run {run_id} is stored, {len(missing)} of {len(files)} attachments not: "
                     f"{names}\n{error.message}")
    if not isinstance(error, Refused):
        error.hint = "run the same command again; only what is missing goes up"
    error.id = run_id
    return error


def created_lines(client, body, run_id, title="Created run"):
    """What people read of a run that is on the server now.

    A body that the checks refuse may be there too: it was parked, and sent by hand.
    """
    facts = [printable(body.get("outcome")), printable(body.get("serial_number"))]
    phases = only_dicts(body.get("phases"))
    if phases:
        count = 0
        for phase in phases:
            count += len(only_dicts(phase.get("measurements")))
        phases_text = counted(len(phases), "phase")
        facts.append(f"{phases_text}, {counted(count, 'measurement')}")
    begin = epoch(body.get("started_at"))
    end = epoch(body.get("ended_at"))
    if begin is not None and end is not None:
        facts.append(seconds_text(end - begin))
    lines = [f"{title} {run_id}", "  " + "  ".join(facts)]
    link = run_link(client, body.get("procedure_id"), run_id)
    if link:
        lines.append("  " + link)
    return lines


def attach_lines(call, client, run_id, files):
    """Attaches files to a run that exists: a line for each."""
    if not files:
        return []
    new = attach(client, run_id, files, call.console.show_upload)
    lines = []
    for file in files:
        done = "Attached" if file in new else "Already there:"
        size = size_text(file.size)
        lines.append(f"{done} {file.name}  {size}  {file.upload_id}")
    return lines


def run_update(call):
    wire = call.arguments.wire("update")
    answer = call.client().update(**wire)
    count = counted(len(wire.get("attachments", ())), "attachment")
    return Result.text(answer, [f"Updated run {answer['id']}: {count} linked"])


def run_update_metadata(call):
    wire = call.arguments.wire("update_metadata")
    if not wire.get("metadata"):
        raise BadInput("--metadata, --set or --unset is missing", "such as --set shift=A")
    warn_of_commas(call)
    answer = call.client().update_metadata(**wire)
    set_keys = [key for key, value in wire["metadata"].items() if value is not None]
    removed_keys = [key for key, value in wire["metadata"].items() if value is None]
    done = []
    if set_keys:
        done.append("set " + ", ".join(set_keys))
    if removed_keys:
        done.append("unset " + ", ".join(removed_keys))
    changes = "; ".join(done)
    return Result.text(answer, [f"Updated metadata of run {answer['id']}: {changes}"])


def run_create_attachment(call):
    values = call.arguments.values("create_attachment")
    path = call.get("file")
    if path:
        return attach_file(call, values, LocalFile(path, values.get("name")))
    if not values.get("name"):
        raise BadInput("--file is missing (--name reserves a place)", "such as --file log.txt")
    wire = call.arguments.wire("create_attachment")
    try:
        answer = call.client().create_attachment(**wire)
    except Unavailable as error:
        if error.maybe_sent:
            error.hint = ("look with get before you try again: an empty attachment may be left\n"
                          "on the run. create-attachment --file does not have this problem")
        raise
    quote = '"' if ON_WINDOWS else "'"
    kind = f"{quote}Content-Type: {content_type(wire['name'])}{quote}"
    return Result.text(answer, [
        f"Attachment {answer['id']} reserved on run {wire['id']}",
        "It has no content yet. The upload URL works for about 60 seconds:",
        "  " + answer["upload_url"], "Upload, then finalize:",
        f"  curl -X PUT -H {kind} -T FILE {quote}URL{quote}",
        f"  {PROG} attachments finalize --id {answer['id']}", "Easier, in one step:",
        f"  {PROG} create-attachment --id {wire['id']} --file FILE"])


def attach_file(call, values, file):
    wire, findings = examine("create_attachment", dict(values, name=file.name))
    if findings.problems:
        raise problems_error(named_by_flags(findings.problems,
                                            OPERATIONS["create_attachment"].record))
    lines = attach_lines(call, call.client(), wire["id"], [file])
    lines.append(f"  run {wire['id']}")
    return Result.text({"id": file.upload_id, "name": file.name}, lines)


def run_initialize(call):
    answer = call.client().initialize(**call.arguments.wire("initialize"))
    return Result.text(answer, [f"Upload {answer['id']}: PUT the bytes within 60 seconds to",
                                "  " + answer["upload_url"], "Then:",
                                f"  {PROG} attachments finalize --id {answer['id']}",
                                f"  {PROG} update --id RUN --attachments {answer['id']}"])


def run_finalize(call):
    wire = call.arguments.wire("finalize")
    answer = call.client().finalize(**wire)
    id = wire["id"]
    lines = [f"Finalized upload {id}", "  " + answer["url"]]
    return Result.text(answer, lines, ids=[id])


def run_rm(call):
    if not call.arguments.flags.get("ids"):
        raise BadInput("a run ID is missing", f"{PROG} rm RUN_ID; ls -q prints the IDs")
    wire = call.arguments.wire("delete")
    ids = list(dict.fromkeys(wire["ids"]))
    client = call.client()
    runs = counted(len(ids), "run")
    ask(call, f"Delete {runs}?")
    answer = client.delete(ids)
    deleted = [printable(id) for id in answer["id"]]
    missing = [id for id in ids if id not in set(deleted)]
    runs = counted(len(deleted), "run")
    lines = [f"Deleted {runs}"]
    lines += ["  " + id for id in deleted]
    if missing:
        lines.append(f"Not there: {len(missing)}")
        lines += ["  " + id for id in missing]
    rows = [{"id": id} for id in deleted]
    return Result.text({"id": deleted}, lines, rows=rows)


class NotKnown(str):
    """The text of a line of `check` that is neither right nor wrong."""


class Station:
    """What `check` looks at, a method for each line: its text, or the Error that is its fault."""

    def __init__(self, call):
        self.call = call
        self.warn = call.console.warn
        call.console.warn = ignore      # the lines tell what is wrong
        self.key_fault = None
        try:
            self.client = call.client()
        except AccessDenied as error:
            self.key_fault = error
            del call.arguments.flags["api_key_file"]
            self.client = call.client()

    def steps(self):
        """(name, function) of each line."""
        steps = []
        for name, text in version_facts():
            if name != "openssl":
                steps.append((name, lambda text=text: text))
        return steps + [
            ("openssl", self.openssl),
            ("url", self.url),
            ("key", self.key),
            ("proxy", self.proxy),
            ("ca", self.ca),
            ("queue", self.queue),
            ("zone", self.zone),
            ("identity", self.identity),
            ("clock", self.clock),
        ]

    def openssl(self):
        text = openssl_version()
        if text is None:
            raise Unavailable("this Python has no ssl module: it cannot speak https",
                              "use a Python that has it")
        return text

    def url(self):
        try:
            return self.client.login.url
        except AccessDenied:        # that is told of the key
            return named_origin(self.call.get("url"), self.client.allow_http) or CLOUD

    def key(self):
        if self.key_fault:
            raise self.key_fault
        login = self.client.login
        if not login.key:
            raise no_key()
        path = self.call.get("api_key_file") or login.source
        if os.path.isfile(path) and is_open_to_others(os.stat(path)):
            raise AccessDenied(f"{path} can be read by other users", "chmod 600 it")
        return f"from {login.source}"

    def proxy(self):
        from urllib.parse import urlsplit
        proxy = self.client.transport.proxy_for(urlsplit(self.client.login.url))
        return without_login(proxy) if proxy else "none"

    def ca(self):
        self.client.login       # may name a CA
        path = self.client.transport.ca_cert
        if path and openssl_version() is not None:
            self.client.transport.make_context()
        return path or "the system's"

    def queue(self):
        path = queue_path(self.call)
        if not os.path.exists(path):
            return self.queue_to_be(path)
        with Queue(path, must_exist=True, read_only=True) as queue:
            meta = queue.meta()
            oldest = queue.oldest_waiting()
            servers = queue.waiting_servers()
        faults = []
        for server in sorted(servers - {None, self.client.login.url}):
            faults.append(f"waiting for another server, {server}")
        age = ""
        if oldest is not None:
            age = ago(time.time() - oldest)
            if time.time() - oldest > DAY:      # cron does not send, or the network is away
                faults.append(f"the oldest was stored {age}")
        if meta["parked"] or meta["moving"] or faults:
            kind = Refused if meta["parked"] else Unavailable
            text = f"{queue_text(meta)} in {path}"
            command = queue_command("ls", queue=self.call.get("queue"))
            raise kind("; ".join([text] + faults), f"{command} tells why")
        size = size_text(meta["bytes"])
        text = f"{meta['waiting']} waiting, {size} in {path}"
        return f"{text}, oldest {age}" if age else text

    def queue_to_be(self, path):
        """Where the queue will be, once something is stored."""
        import_sqlite(path)
        folder = os.path.dirname(os.path.abspath(path))
        if folder == home():    # it is made when it is needed
            while not os.path.exists(folder):
                folder = os.path.dirname(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise Unavailable(f"cannot make {path}: no folder that this user can write",
                              "make the folder, or name another queue")
        return f"none at {path}"

    def zone(self):
        name = unknown_time_zone()
        if name:
            raise BadInput(f"TZ={name} is not known on this machine: local times are taken as UTC",
                           "install the time zone data, or give times with their offset")
        return f"{time.strftime('%Z')}, {time.strftime('%z')} now"

    def identity(self):
        if self.key_fault:
            raise self.key_fault
        self.client.notify = self.warn      # of each wait
        try:
            found = self.client.whoami()
        except NotFound as error:
            if error.status != 404:
                raise
            self.client.list(limit=1)
            return NotKnown("not told: the server is older than API 2.22; it takes the key")
        name = get_path(found, "station.name") or get_path(found, "user.email")
        return f"{found.get('type')} {name} of {get_path(found, 'organization.name')}"

    def clock(self):
        if self.client.transport.server_clock is None:
            return NotKnown("not compared: no answer")
        theirs, ours = self.client.transport.server_clock
        ahead = round(ours - theirs)
        if abs(ahead) > 120:
            direction = "ahead of" if ahead > 0 else "behind"
            raise BadInput(f"{abs(ahead)} s {direction} the server",
                           "set this machine's clock: certificates and times depend on it")
        return f"{abs(ahead)} s from the server's"


def run_check(call):
    """A line for each thing that a station needs, ok or FAIL; exits as its first failure does."""
    station = Station(call)
    rows, lines, exit_code = [], [], 0
    for name, step in station.steps():
        try:
            text, error = step(), None
            mark = "-   " if isinstance(text, NotKnown) else "ok  "
        except Error as failure:
            text, error = failure.text, failure
            mark = "FAIL"
            exit_code = exit_code or failure.exit_code
        if error and text in [row["text"] for row in rows]:
            continue        # told already
        rows.append({
            "name": name,
            "ok": error is None,
            "text": text,
            "error": error.as_json() if error else None,
        })
        one_line = re.sub(r"(\w)\n", r"\1; ", text).replace("\n", " ")
        lines.append(f"{mark}  {name:<9} {one_line}")
        before = "Fix: "
        for hint in error.hint.splitlines() if error else ():
            lines.append(f"      {before}{hint}")
            before = ""
    return Result.text({"data": rows}, lines, ids=(), rows=rows, exit_code=exit_code)


def openssl_version():
    """The OpenSSL of this Python, or None where it has no ssl."""
    try:
        from ssl import OPENSSL_VERSION
    except ImportError:
        return None
    return OPENSSL_VERSION


def version_facts():
    """(name, text) of each line of --version: what an audit of many copies asks."""
    path = os.path.abspath(__file__)
    with open(path, "rb") as file:
        sha256 = sha256_of([file.read()])
    python = sys.version.split()[0]
    openssl = openssl_version() or "no ssl in this Python"
    return [
        ("version", f"{PROG} {__version__}"),
        ("sha256", sha256),
        ("python", f"{python} on {sys.platform}"),
        ("openssl", openssl),
        ("path", path),
    ]


# ---- queue commands ------------------------------------------------------------------------------

QUEUED_SECONDS = 10         # after the commit, create --queue ends within this time


def run_create(call):
    if call.get("example"):
        return Result.text(EXAMPLE_RUN, dump_json(EXAMPLE_RUN, 2).split("\n"), ids=())
    wire, findings = examine_create(call)
    queue_is_named = call.get("queue") or environment("TOFUPILOT_QUEUE")
    if (queue_is_named or call.get("offline")) and not call.is_dry_run:
        return create_queued(call, wire, findings)
    return create_directly(call, wire, findings)


def create_queued(call, wire, findings):
    """Stores a run, then sends it and older ones for ten seconds at most."""
    path = queue_path(call)
    allow_http = bool(call.get("allow_http"))
    server = named_server(call.get("url"), allow_http, call.console.warn)
    files, unreadable = open_files(attached_paths(call))
    body = storable_request(wire, findings.problems)
    with contextlib.ExitStack() as stack:
        try:
            # Open to the end: see open_queues about a second descriptor.
            queue = stack.enter_context(Queue(path))
            stored = queue.store(body, files, server, findings.problems)
        except Unavailable as error:
            return create_unqueued(call, wire, findings, error)
        left_out = unreadable + stored.left_out
        queue.remember_left_out(stored.entry, left_out)
        is_parked = stored.entry["state"] == "parked"
        problems = findings.problems if is_parked else []
        call.queued_exit_code = 5 if is_parked or left_out else 0
        trouble = []
        if stored.entry["state"] == "waiting" and not call.get("offline"):
            send_for_a_while(call, path, trouble)
        entry = queue.by_ref(stored.entry["ref"]) or stored.entry
        result = queued_result(call, queue, stored, entry, wire, trouble)
        for note in stored.notes:
            call.console.note(note)
        tell_left_out(call, left_out)
        if entry["state"] == "parked":
            tell_parked(call, entry, problems)
        tell_old(call, queue, entry)
    result.exit_code = call.queued_exit_code
    problems = problems + left_out_problems(left_out)
    if problems:
        result.document["state"] = entry["state"]
        result.document["problems"] = problems
    return result


def send_for_a_while(call, path, trouble):
    """One pass over the queue in a thread. Nothing here is a failure: the run is stored."""
    def send():
        try:
            with Queue(path) as queue:
                work = SendPass(queue, call.client(0))
                work.run()
                for _, reason in work.failures:
                    trouble.append(reason)
        except Exception as error:
            trouble.append(str(error))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            wait = start_thread(send)
            wait(QUEUED_SECONDS)
    except RuntimeError as error:
        trouble.append(f"not sent yet: {error}")


def queued_result(call, queue, stored, entry, wire, trouble):
    """What a create with a queue prints: the run, or that it waits and why."""
    is_sent = entry["state"] == "sent"
    run_id = entry["run_id"] if is_sent else None
    document = {"id": run_id, "queued": not is_sent, "client_run_ref": entry["ref"]}
    ref = short_ref(entry)
    path = printable(queue.path)
    if is_sent:
        title = "Created run"
        if stored.entry["state"] == "sent":
            title = "Already there: run"
        shown = dict(wire, serial_number=entry["serial_number"])
        lines = created_lines(call.client(0), shown, run_id, title)
        for file in queue.files(entry["id"]):
            lines.append(f"  Attached {file.name}  {size_text(file.size)}")
        return Result.text(document, lines)
    if entry["state"] == "parked":
        return Result.text(document, [f"Parked {ref} in {path}"], ids=())
    waiting = queue.meta()["waiting"]
    lines = [f"Queued {ref} in {path}, {entry['state']}; {waiting} waiting"]
    if entry["state"] in ("moving", "moved"):
        target = move_target(entry)[1]
        lines.append(f"  moved to {target}")
    elif entry["error"]:
        lines.append("  " + printable(entry["error"], 300))
    elif trouble:
        lines.append("  " + printable(trouble[0], 300))
    return Result.text(document, lines, ids=())


def tell_left_out(call, left_out):
    for name, reason in left_out:
        call.console.warn(f"{printable(name)} was left out: {reason}")
    if left_out:
        call.console.note("Fix: the same command again adds a file, once it can be read")


def tell_parked(call, entry, problems):
    """Says why a run is parked, and the command that corrects it."""
    reasons = group_issues(problems)
    if not reasons:
        reasons = [entry["error"] or "refused"]
    for reason in reasons:
        call.console.note("  " + printable(reason, 500))
    ref = short_ref(entry)
    path = call.get("queue")
    command = queue_command("fix", ref, queue=path)
    if any(map(is_inside_json, problems)):
        shown = queue_command("get", ref, "--json", "--out", "run.json", queue=path)
        call.console.note(f"Fix: {shown}")
        call.console.note(f"  edit run.json, then: {command} --body @run.json")
    else:
        call.console.note(f"Fix: {command} [flags of create]")
    removal = queue_command("rm", ref, queue=path)
    call.console.note(f"  or, if you create the run anew: {removal}")


def is_inside_json(problem):
    """Whether a problem is of a place that no flag alone can correct."""
    return bool(re.match(r"\w+\[\d+\]\.", problem))


def tell_old(call, queue, entry):
    """Says that runs are parked, or wait for more than a day."""
    meta = queue.meta()
    oldest = queue.oldest_waiting()
    is_old = oldest is not None and time.time() - oldest > DAY
    others_parked = meta["parked"] and entry["state"] != "parked"
    if is_old or others_parked:
        command = queue_command("ls", queue=call.get("queue"))
        path = printable(queue.path)
        call.console.warn(f"{queue_text(meta)} in {path}: see {command}")


def create_unqueued(call, wire, findings, error):
    """The queue cannot be written: sends the run directly, or says that it is NOT stored.

    Whatever failed is Unavailable: the same command again may find the queue, which takes even a
    run that the server refuses.
    """
    failure = error
    if not call.get("offline"):
        call.console.warn(f"{error.text}; the run is sent directly")
        try:
            return create_directly(call, wire, findings)
        except Error as failed:
            if failed.id:
                raise       # the run is stored, a file is not
            failure = failed
    told = Unavailable(failure.message, failure.hint, failure.status, failure.code, failure.issues)
    told.notes = failure.notes
    raise told.with_note("the run is NOT stored in the queue") from None


def create_directly(call, wire, findings):
    if findings.problems:
        raise problems_error(findings.problems)
    files = [LocalFile(path) for path in attached_paths(call)]
    return create_now(call, with_ref(wire), files)


def open_queue(call, read_only=False):
    """The queue that a command works on, which must be there."""
    return Queue(queue_path(call), must_exist=True, read_only=read_only)


def refuse_dry_run(call):
    """For commands that send no request."""
    if call.is_dry_run:
        raise BadInput("--dry-run: this command sends no request, it changes the queue",
                       "queue ls shows what is in it")


def entry_json(entry):
    """An entry as queue ls shows it."""
    error = entry["error"]
    if entry["left_out"]:
        error = "without " + left_out_names(entry)
        if entry["error"]:
            error += f"; {entry['error']}"
    return {
        "client_run_ref": entry["ref"],
        "state": entry["state"],
        "outcome": entry["outcome"],
        "serial_number": entry["serial_number"],
        "procedure_id": entry["procedure_id"],
        "stored_at": utc_from_epoch(entry["stored_at"]),
        "tries": entry["tries"],
        "next_try_at": utc_from_epoch(entry["next_try_at"] or None),
        "error": error,
        "run_id": entry["run_id"],
        "attachments": entry["files"],
    }


def run_queue_ls(call):
    where = f"state != 'storing' AND state NOT IN {ENDED}"
    columns = QUEUE_COLUMNS
    if call.get("sent"):
        where = "state NOT IN ('storing', 'fixed')"
        columns = RECEIPT_COLUMNS

    def rows():
        with open_queue(call, read_only=True) as queue:
            for window in queue.windows(where):
                yield [entry_json(entry) for entry in window]
    with open_queue(call, read_only=True) as queue:
        meta = queue.meta()
    if not call.is_quiet:
        size = size_text(meta["bytes"])
        call.console.note(f"{queue_text(meta)}, {size} in {meta['file']}")
    del meta["moving"]      # the rows say it; the document has the keys that were promised
    return Result.table({"meta": meta}, rows(), columns, id_key="client_run_ref")


def run_queue_get(call):
    folder = call.get("download")
    saved = []
    with open_queue(call, read_only=True) as queue:
        entry = queue.find(given_word(call, "REF"))
        files = queue.files(entry["id"])
        body = queue.body(entry["id"])
        if folder and body:
            saved = save_queued_files(call, files, folder)
    if entry["state"] == "fixed":
        ref = entry["target"][:12]
        raise NotFound(f"{short_ref(entry)} was corrected", f"its REF is {ref} now")
    if not body and call.format == "json":
        raise NotFound(f"the request of {short_ref(entry)} is gone: it is {entry['state']}",
                       "queue ls --sent --json shows what is left")
    lines = entry_lines(entry)
    sizes = [f"{file.name}  {size_text(file.size)}" for file in files]
    lines += section("ATTACHMENTS", sizes)
    lines += section("SAVED", saved)
    return Result.text(request_of(entry, body), lines, ids=[entry["ref"]])


def save_queued_files(call, files, folder):
    """Saves the files of an entry: their paths."""
    paths = []
    for file in files:
        if not file.has_content():
            call.console.warn(f"{file.name} went up already and is not in the queue any more")
            continue

        def write(target, file=file):
            for block in file.blocks():
                write_block(target, block)
        paths.append(save_new(folder, file.name, write))
    return paths


def entry_lines(entry):
    """What is known of an entry, for people."""
    facts = entry_json(entry)
    facts["server"] = entry["origin"] or entry["server"]
    lines = []
    for name, value in facts.items():
        if value not in (None, ""):
            lines.append(f"{name:<15} {value}")
    return lines


def request_of(entry, body):
    """The request of an entry as create takes it; a ref made from the content is left out."""
    try:
        request = json.loads(body or "{}")
        is_intact = not body or run_ref(request) == entry["content"]
    except (AttributeError, TypeError, ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        raise Damaged(f"the request of {short_ref(entry)} in the queue file is damaged",
                      "queue fix with --body gives it a new one")
    if entry["ref"] == entry["content"]:
        request.pop("client_run_ref", None)
    return request


def given_refs(call):
    """The REFs that a queue command was given, with @FILE and - one a line; at least one."""
    refs = call.arguments.read_list(call.arguments.words, "REF")
    if not refs:
        raise BadInput("a REF is missing: queue ls shows them", f"{PROG} {call.name} --help")
    return refs


def given_word(call, what):
    """The one plain word that a queue command takes: `what`."""
    words = call.arguments.words
    if not words:
        raise BadInput(f"{what} is missing", f"{PROG} {call.name} --help")
    if len(words) > 1:
        raise BadInput(f"this command takes one {what}; {len(words)} are given", "one at a time")
    return words[0]


def run_queue_fix(call):
    refuse_dry_run(call)
    word = given_word(call, "REF")
    require_correction(call, word)
    with open_queue(call) as queue:
        entry = queue.find(word)
        require_correctable(entry)
        wire, findings = corrected_request(call, queue, entry)
        values = entry_values(storable_request(wire, findings.problems), findings.problems)
        values["state"] = "parked" if findings.problems else "waiting"
        files, unreadable = open_files(attached_paths(call))
        stored = queue.correct(entry, values, files)
        left_out = unreadable + stored.left_out
        queue.remember_left_out(stored.entry, left_out)
    tell_left_out(call, left_out)
    ref = stored.entry["ref"]
    state = stored.entry["state"]
    name = ref[:12]
    if ref != entry["ref"]:
        name += f" (was {short_ref(entry)})"
    lines = [f"Fixed {name}, {state}"]
    if findings.problems:
        lines = [f"{ref[:12]} is parked"]
        tell_parked(call, stored.entry, findings.problems)
    exit_code = 5 if findings.problems or left_out else 0
    document = {"client_run_ref": ref, "state": state, "problems": findings.problems}
    return Result.text(document, lines, ids=[ref], exit_code=exit_code)


def require_correction(call, word):
    """BadInput where no flag says what to correct."""
    others = {"queue"} | set(GLOBAL.by_name)
    if not set(call.arguments.flags) - others:
        command = queue_command("fix", word, queue=call.get("queue"))
        raise BadInput("nothing to correct: give flags of create",
                       f"such as {command} --part-number PCB01")


def corrected_request(call, queue, entry):
    """(the request of an entry with the flags of the command line, Findings)."""
    start = None
    if not call.arguments.flags.get("body"):
        start = request_of(entry, queue.body(entry["id"]))
    wire, findings = examine_create(call, start)
    if start:
        findings.problems += lost_numbers(entry, wire)
    has_own_ref = entry["ref"] != entry["content"]
    if has_own_ref and "client_run_ref" not in wire:
        wire["client_run_ref"] = entry["ref"]       # one given by hand stays
    return wire, findings


def run_queue_rm(call):
    refuse_dry_run(call)
    with open_queue(call) as queue:
        found = {}
        for word in given_refs(call):
            entry = queue.find(word)
            found[entry["id"]] = entry
        entries = list(found.values())
        ask(call, f"Remove {counted(len(entries), 'run')} from the queue?")
        with queue.sender_lock() as is_alone, queue.transaction():
            for entry in entries:
                require_not_moving(queue, entry)
                if not is_alone:
                    require_not_under_way(queue, entry)
                queue.drop("id = ?", entry["id"])
        queue.release_room()
    removed = [entry["ref"] for entry in entries]
    lines = []
    for entry in entries:
        facts = [short_ref(entry), entry["serial_number"], entry["outcome"]]
        text = " ".join(fact for fact in facts if fact)
        state = entry["state"]
        if state in OPEN and entry["tried_at"]:
            state += ", and perhaps on the server"
        lines.append(f"Removed {text} ({state})")
    return Result.text({"client_run_ref": removed}, lines, ids=removed)


def require_not_moving(queue, entry):
    """BadInput where a move that is not finished may have brought the entry to another file."""
    now = queue.by_number(entry["id"])
    if now and now["state"] == "moving":
        target = move_target(now)[1]
        command = queue_command("move", target, queue=queue.path)
        raise BadInput(f"{short_ref(entry)} is on its way to {target}",
                       f"finish that and remove it there: {command}")


def require_not_under_way(queue, entry):
    """Unavailable where another process may be sending the entry right now."""
    now = queue.by_number(entry["id"])
    if now and now["state"] == "waiting" and now["tried_at"]:
        raise Unavailable(f"{short_ref(entry)} may be on its way to the server right now",
                          "run the same command again")


def run_queue_send(call):
    jitter = call.get("jitter")
    if jitter:
        import random
        time.sleep(random.uniform(0, jitter))
    with open_queue(call) as queue:
        if call.is_dry_run:
            return show_sends(call, queue, queue.entries("state = 'waiting'"))
        return send_queue(call, queue)


def run_queue_retry(call):
    words = call.arguments.read_list(call.arguments.words, "REF")
    with open_queue(call) as queue:
        entries = [queue.find(word) for word in words]
        for entry in entries:
            require_open(entry)
        if call.is_dry_run:
            return show_sends(call, queue, entries or queue.entries(f"state IN {OPEN}"))
        call.client(0).login        # a URL that is wrong changes nothing
        if words:
            for entry in entries:
                queue.retry(entry["id"])
                take_to_url(call, queue, entry["id"])
        else:
            retry_all(queue)
            take_to_url(call, queue)
        return send_queue(call, queue)


def require_open(entry):
    """BadInput for a REF whose entry is not there to be sent any more."""
    if entry["state"] not in OPEN:
        raise BadInput(f"{short_ref(entry)} is {entry['state']}: there is nothing to send")


def retry_all(queue):
    """Makes all that waits due, and what is parked, if the checks of this version take it."""
    queue.retry_waiting()
    for entry in queue.entries("state = 'parked'"):
        if passes_checks(queue, entry):
            queue.retry(entry["id"])


def take_to_url(call, queue, number=None):
    """Binds what never went out to the server that --url names."""
    url = call.get("url")
    if url:
        queue.name_server(normal_url(url), number)


def passes_checks(queue, entry):
    """Whether the checks of this version take the request of an entry."""
    try:
        body = json.loads(queue.body(entry["id"]))
        _, findings = examine("create", body)
    except (AttributeError, TypeError, ValueError, RecursionError):
        return False
    except QueueUnusable as error:
        if not is_damaged_page(error):
            raise
        return False        # the others go on
    return not findings.problems and not lost_numbers(entry, body)


def lost_numbers(entry, body):
    """Problems of texts that stand where a run was stored with a NaN or Infinity: see storable.

    In a run that the server refused they are the user's own texts: it was right here.
    """
    was_refused_here = entry["exit_code"] == 5 and not entry["tries"]
    return names_of_no_number(body) if was_refused_here else []


def names_of_no_number(value, path=""):
    """A problem for each text in the value that is NaN or Infinity."""
    problems = []
    if isinstance(value, dict):
        for key, item in value.items():
            problems += names_of_no_number(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            problems += names_of_no_number(item, f"{path}[{number}]")
    elif value in ("NaN", "Infinity", "-Infinity"):
        place = path.lstrip(".")
        problems.append(f"{place}: {value} is not valid JSON")
    return problems


def show_sends(call, queue, entries):
    """--dry-run of a pass: the creates of the entries, whether they are due or not."""
    client = call.client(0)
    for entry in entries:
        server = bound_server(entry)
        if server not in (None, client.login.url):
            call.console.note(f"{short_ref(entry)} waits for {server}: name it with --url")
            continue
        try:
            body = queue.intact_body(entry)
        except Removed:
            continue
        except Damaged as error:
            call.console.warn(f"{short_ref(entry)}: {error.text}")
            continue
        client.send_create(body)
    return None


def send_queue(call, queue):
    """One pass; the result is what was sent, and an exit status that tells what was not."""
    console = call.console
    work = SendPass(queue, call.client(0), console.log)
    was_alone = work.run()
    meta = queue.meta()
    codes = set(work.exit_codes)
    if not was_alone:
        console.note("another process is sending this queue: nothing to do")
    elif meta["parked"]:
        codes.add(5)
    text = pass_text(call, queue, work, meta)
    if work.sent or codes or isatty(sys.stdout):
        console.log(text)
    document = {"sent": len(work.sent), "waiting": meta["waiting"], "parked": meta["parked"]}
    rows = sent_rows(queue.path, work.sent)
    result = Result.table(document, rows, SENT_COLUMNS, rows_key="runs", is_logged=True)
    for code in (3, 5, 6):
        if code in codes:
            result.exit_code = code
            break
    if result.exit_code and not console.is_logging:     # else the log has told it
        result.error = pass_error(call, work, result.exit_code, text)
    return result


def pass_text(call, queue, work, meta):
    """What came of a pass, in a line."""
    text = f"{len(work.sent)} sent, {queue_text(meta)}"
    rows = queue.sql("SELECT min(next_try_at) AS soon FROM entry WHERE state = 'waiting'")
    soon = rows[0]["soon"]
    if is_number(soon) and soon > time.time():
        text += f"; next try {ago(time.time() - soon)}"
    if meta["parked"]:
        command = queue_command("ls", queue=call.get("queue"))
        text += f"; see {command}"
    return text


def pass_error(call, work, exit_code, text):
    """The Error of a pass that did not send all."""
    kinds = {3: AccessDenied, 5: Refused, 6: Unavailable}
    for entry, reason in work.failures:
        text += f"; {entry['serial_number']}: {reason}"
    command = queue_command("ls", queue=call.get("queue"))
    return kinds[exit_code](text, f"{command} tells why")


def sent_rows(path, numbers):
    """{"client_run_ref", "id"} of receipts, a few at a time."""
    with Queue(path, must_exist=True, read_only=True) as queue:
        for start in range(0, len(numbers), WINDOW):
            some = ", ".join(map(str, numbers[start:start + WINDOW]))
            rows = queue.sql(f"SELECT ref, run_id FROM entry WHERE id IN ({some}) ORDER BY id")
            yield [{"client_run_ref": row["ref"], "id": row["run_id"]} for row in rows]


def run_queue_move(call):
    refuse_dry_run(call)
    target = given_word(call, "FILE")
    path = local_path(target)
    if not os.path.basename(path) and not os.path.isdir(path):
        raise BadInput(f"there is no folder {target}", "mount the stick, or make the folder")
    with open_queue(call) as queue:
        count, path, is_new = move(queue, path)
        parked = queue.meta()["parked"]
    text = "Nothing is waiting"
    if count:
        file = "a new file, " if is_new else ""
        runs = counted(count, "run")
        text = f"Moved {runs} to {file}{path}, which holds the only copy now"
    if parked:
        text += f"; {parked} parked here"
    lines = [text]
    if count:
        command = queue_command("send", queue=path)
        lines.append(f"  to send them: {command}")
    return Result.text({"moved": count, "file": path}, lines, ids=())


# ---- command line --------------------------------------------------------------------------------

class Command:
    """A command: the function that runs it, its flags, and its help.

    `words` says in the usage line what it takes besides flags; `word_field` is the field that plain
    words stand for, where they are no REFs or files; `columns` says what --columns may name.
    """

    def __init__(self, run, sentence, fields, examples=(), words="", word_field=None, columns=""):
        self.run = run
        self.sentence = sentence
        self.fields = fields
        self.examples = examples
        self.words = words
        self.word_field = word_field
        self.columns = columns


COMMANDS = {
    "ls": Command(
        run_ls, "List runs, newest first.",
        LIST.fields + group(
            "page and order",
            Field("all", "flag", "all runs that match"),
            Field("page_size", "page", "rows per request, 1 to 100", "100"),
        ) + group(
            "output",
            Field("fail_empty", "flag", "exit 4 when no run matches"),
            Field("summary", "flag", "counts, yields and the serials that fail most, of all pages"),
        ),
        ["--procedure-ids proc_abc --outcomes PASS --limit 50",
         "--started-after yesterday --outcomes FAIL --all --out failures.xlsx",
         "--serial-numbers SN-0001 --fail-empty -q",
         "--started-after 7d --summary"],
        columns=" ".join(RUN_CSV_COLUMNS) + " metadata.KEY"),
    "get": Command(
        run_get, "Show runs: verdict, phases, measurements, files.",
        group(
            "which runs",
            Field("ids", "id", "run IDs, as plain words too, or @FILE or - with one a line",
                  "run_abc123", many=True),
            Field("serial_number", "serial", "the newest run of this unit instead", "SN-0001"),
        ) + group(
            "output",
            Field("failed_only", "flag", "phases and measurements that failed, in a table or "
                  "spreadsheet of measurements too"),
            Field("logs", "flag", "the log lines too"),
            Field("download", "path", "save all attachments in a folder", "evidence"),
            Field("exit_status", "flag", "exit 10 unless every run is PASS"),
        ),
        ["run_abc123", "--serial-number SN-0001 --failed-only --logs",
         "run_abc123 --download evidence", "--ids @ids.txt --out measurements.xlsx"],
        "ID ...", "ids",
        columns=" ".join(MEASUREMENT_COLUMNS) + " for a row for each measurement; or those of ls"),
    "create": Command(
        run_create, "Create a run. The same command again is the same run.",
        REQUEST + group("content", Field(
            "example", "flag", "print a body with all that can stand in it, and send nothing")
        ) + QUEUE + group("queue", Field(
            "offline", "flag", "store in the queue only: no network, no key")),
        ["--outcome PASS --procedure-id proc_abc --serial-number SN-0001 --started-at "
         "2026-05-19T08:00:00Z --ended-at 2026-05-19T08:00:42Z",
         "--example --out run.json",
         "--body @run.json --attach report.pdf scope.png",
         "--body @run.json --queue line3.queue"]),
    "update": Command(
        run_update, "Link uploads to a run.", OPERATIONS["update"].fields,
        ["run_abc --attachments att_1 att_2"], "ID", "id"),
    "update-metadata": Command(
        run_update_metadata, "Set or delete keys of a run's metadata; the others stay.",
        OPERATIONS["update_metadata"].fields + SET + UNSET,
        ["""run_abc --metadata '{"shift":"A","temp":23.4}'""", "run_abc --set shift=A --unset lot"],
        "ID", "id"),
    "create-attachment": Command(
        run_create_attachment, "Attach a file to a run, or reserve a place for one.",
        RUN_ID.fields + group(
            "file",
            Field("name", "name", "the file's name on the run, with its extension", "report.pdf"),
            Field("file", "path", "upload this file and link it; --name is then its own",
                  "report.pdf"),
        ),
        ["run_abc --file report.pdf", "--id run_abc --name report.pdf"], "ID", "id"),
    "rm": Command(
        run_rm, "Delete runs, with all that belongs to them.", RUN_IDS.fields + YES,
        ["run_a run_b", "--ids @old.txt --yes"], "ID ...", "ids"),
    "attachments initialize": Command(
        run_initialize, "Make an upload that no run has yet.", FILE_NAME.fields,
        ["--name report.pdf"]),
    "attachments finalize": Command(
        run_finalize, "Close an upload whose bytes were PUT by hand.", UPLOAD_ID.fields,
        ["--id att_1"]),
    "queue ls": Command(
        run_queue_ls, "List the runs that wait, and those that were refused (parked).",
        QUEUE + group("output", Field("sent", "flag", "receipts of the last 30 days too")),
        ["", "--queue line3.queue --sent"]),
    "queue get": Command(
        run_queue_get, "Show an entry (REF); --json is its request, for create --body.",
        QUEUE + group("output", Field(
            "download", "path", "save its attachments in a folder", "evidence")),
        ["3e1f7d02", "3e1f7d02 --out run.json"], "REF"),
    "queue fix": Command(
        run_queue_fix, "Correct an entry (REF) that no server has, with create's flags.",
        optional(REQUEST) + QUEUE,
        ["3e1f7d02 --part-number PCB01", "3e1f7d02 --body @run.json --attach log.txt"], "REF"),
    "queue send": Command(
        run_queue_send, "Send what is due, oldest first. For cron.",
        QUEUE + group("queue", Field(
            "jitter", "seconds", "wait up to so long first: many stations share a minute", "60")),
        ["--jitter 60 --url https://tofupilot.example.com", "--queue line3.queue"]),
    "queue retry": Command(
        run_queue_retry, "Send parked and waiting runs (REFs, or all) without waiting.",
        QUEUE, ["", "3e1f7d02", "--url https://tofupilot.example.com"], "[REF ...]"),
    "queue rm": Command(
        run_queue_rm, "Remove entries (REFs) from the queue, unsent.", QUEUE + YES,
        ["3e1f7d02"], "REF ..."),
    "queue move": Command(
        run_queue_move, "Hand all waiting runs to another queue file, such as on a stick.",
        QUEUE, ["/media/stick/line3.queue"], "FILE"),
    "check": Command(
        run_check, "Is this station set up? The first command on a new one.", QUEUE, [""]),
}
FAMILIES = {"attachments": "uploads by hand", "queue": "runs that wait"}

OWN_KINDS = ("path", "seconds", "page")     # of flags that are never part of a request
TELL_EMPTY = ("id", "serial", "identifier", "enum")     # kinds whose check names an empty value

# By kind of a field; else the last word of its name.
METAVARS = {"id": "ID", "duration": "DURATION", "time": "TIME", "when": "TIME", "seconds": "S",
            "record": "JSON", "metadata": "JSON", "object": "JSON", "integer": "N", "limit": "N",
            "count": "N", "page": "N", "path": "FILE", "boolean": "true|false"}
NAMED_METAVARS = {"body": "JSON", "set": "KEY=VALUE", "unset": "KEY", "download": "FOLDER"}

EXIT_STATUS = """\
  0  done, or stored in the queue       4  not found
  1  unexpected: a bug, a disk error    5  the server refused the data, or the
  2  wrong usage; nothing was sent         run is in the queue but parked
  3  no key, or not allowed             6  unavailable: run it again later
  10  --exit-status: a run is not PASS   130, 143  stopped by Ctrl-C or SIGTERM
"""

ABOUT_QUEUE = """\
  create --queue FILE stores the run first, then sends it: exit 0 is safe
  whatever the network does. create --offline only stores it. queue send, from
  cron, sends what waits; name the server with --url there. A run that is
  refused is parked: queue fix corrects it. The status of create is decided
  when the run is stored; what the server refuses later makes queue send end
  with 5 until it is corrected. queue move FILE hands all waiting runs to a
  stick; never copy the file.
"""


def command_list():
    """The commands with their sentences, a line each."""
    lines = []
    for name, command in COMMANDS.items():
        if " " not in name:
            lines.append(f"  {name:<18} {command.sentence}")
    for family, what in FAMILIES.items():
        names = ", ".join(name.partition(" ")[2] for name in inner_commands(family))
        lines.append(f"  {family:<18} {what}: {names}")
    return "\n".join(lines)


def summary_text():
    """What a call without a command prints."""
    return (f"usage: {PROG} COMMAND [flags]    manual: {PROG} --help\n\n{command_list()}\n\n"
            f"first steps: {set_variable('TOFUPILOT_API_KEY', '...')}, then {PROG} check\n")


def manual_text():
    """The top help: all that a station without a network needs to know."""
    flags = "".join(flag_help(field) for field in GLOBAL.fields)
    return f"""\
{PROG} {__version__}: the test runs of a TofuPilot server, from one file.

{summary_text()}
Each command's help has examples and its flags:  {PROG} ls --help
The word runs may stand before a command. List flags take several words and may
be repeated. JSON flags also take @FILE, or - for stdin. A value that begins
with - needs = before it. Times: ISO 8601, local without an offset; in ls also
a date, today, yesterday, 24h, 7d, now.

every command
{flags}  {"--version":<19} version and sha256 of this file, Python, OpenSSL

exit status
{EXIT_STATUS}
environment
  TOFUPILOT_API_KEY   the key             TOFUPILOT_URL     the server
  TOFUPILOT_CA_CERT   a private CA        TOFUPILOT_QUEUE   the queue file
  TOFUPILOT_HOME      else ~/.tofupilot   HTTPS_PROXY, NO_PROXY, NO_COLOR

queue
{ABOUT_QUEUE}"""


def flag_help(field):
    """A flag of every command for the manual, in lines of 79 columns."""
    import textwrap
    name = flag_name(field.name)
    if field.kind != "flag":
        name += " " + metavar(field)
    text = field.help
    if field.choices:
        text += ": " + " ".join(field.choices)
    lines = textwrap.wrap(text, 56)
    indented = ("\n" + " " * 22).join(lines)
    return f"  {name:<19} {indented}\n"


def metavar(field):
    if field.name in NAMED_METAVARS:
        return NAMED_METAVARS[field.name]
    last_word = field.name.rstrip("s").rpartition("_")[2]
    return METAVARS.get(field.kind, last_word.upper())


class Parser(argparse.ArgumentParser):
    """The parser of a command, or of a word before others.

    It is made when it is called, with its flags or the commands below it: only what the command
    line needs. What is wrong is raised.
    """

    def __init__(self, path="", **_):       # argparse offers a prog of its own, 3.14 a color
        self.path = path

    def parse_known_args(self, args=None, namespace=None):
        def form(prog):
            width = min(100, terminal_width()) - 1
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)
        super().__init__(f"{PROG} {self.path}".rstrip(), add_help=False,
                         formatter_class=form, argument_default=argparse.SUPPRESS)
        self.color = False
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        command = COMMANDS.get(self.path)
        if command:
            self.set_defaults(entry=self.path)
            add_flags(self, command.fields)
        else:
            # A name with a space cannot be a flag's.
            tree = self.add_subparsers(dest=self.path + " word")
            families = [] if self.path else ["runs", *FAMILIES]
            for name in inner_commands(self.path) + families:
                tree.add_parser(name.rpartition(" ")[2], path=name)
        add_flags(self, GLOBAL.fields, are_shown=False)
        return super().parse_known_args(args, namespace)

    def format_help(self):
        command = COMMANDS.get(self.path)
        if command:
            examples = [example_line(self.path, example) for example in command.examples]
            names = " ".join(flag_name(field.name) for field in GLOBAL.fields)
            self.usage = usage_of(self.path)
            self.description = "\n".join([command.sentence, ""] + examples)
            self.epilog = json_examples(command.fields)
            if command.columns:
                self.epilog += wrapped(f"--columns: {command.columns}") + "\n\n"
            self.epilog += wrapped(f"every command: {names}") + f"\n{PROG} --help explains these."
            return super().format_help()
        if not self.path:
            return manual_text()
        lines = [f"usage: {PROG} {self.path} COMMAND [flags]", ""]
        names = inner_commands(self.path)
        width = max(map(len, names)) + 2
        for name in names:
            lines.append(f"  {name:<{width}}{COMMANDS[name].sentence}")
        return "\n".join(lines) + "\n"

    def print_help(self, file=None):
        sys.stdout.write(self.format_help())    # argparse itself would hide a full disk

    def _get_option_tuples(self, option_string):
        # No abbreviations; allow_abbrev=False would refuse -qv before 3.8.
        return [] if option_string.startswith("--") else super()._get_option_tuples(option_string)

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices:
            return
        hint = f"{PROG} --help lists them"
        meant = closest(value, list(action.choices))
        if meant:
            hint = f"did you mean {meant}?"
        elif value == "login":
            hint = f"there is no login: {set_variable('TOFUPILOT_API_KEY', '<key>')}"
        raise BadInput(f"there is no command {printable(value, 60)}", hint)

    def error(self, message):
        hint = f"see {self.prog} --help"
        if "expected" in message:
            hint += "; a value that begins with - needs = before it"
        if "--sub-units: expected" in message:
            hint = 'for a run without sub-units: --sub-units ""'
        if re.search("-(after|before): expected", message):
            hint = "such as 7d (that long ago, without a minus), today or 2026-05-19T08:00:00Z"
        raise BadInput(message.replace("argument ", "", 1), hint)


def usage_of(path):
    """The usage line of a command: its words, and the flags that it cannot do without."""
    parts = [PROG, path]
    command = COMMANDS.get(path)
    if command:
        parts.append(command.words)
        for field in command.fields:
            if field.required and field.name != command.word_field:
                parts.append(f"{flag_name(field.name)} {metavar(field)}")
    return wrapped(" ".join(part for part in parts + ["[flags]"] if part))


def wrapped(text):
    """A text in lines that fit the terminal, none of which breaks a flag."""
    import textwrap
    width = min(72, terminal_width() - 8)      # argparse puts "usage: " before it
    return textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False)


def example_line(path, example):
    """An example of a command, in lines of 79 columns."""
    line, lines = f"  {PROG} {path}", []
    for part in re.split(" (?=--)", example):
        if len(f"{line} {part}") > 77:
            lines.append(line + " \\\n")
            line = "     "
        line += f" {part}"
    return "".join(lines + [line]).rstrip()


def add_flags(parser, fields, are_shown=True):
    """Adds the flags of fields, in groups. A flag that is not given is not in the result."""
    groups = {}
    for field in fields:
        if are_shown and field.group not in groups:
            groups[field.group] = parser.add_argument_group(field.group)
        name = flag_name(field.name)
        options = {"metavar": metavar(field)}
        if field.kind == "flag":
            options = {"action": "store_true"}
        if field.kind == "boolean":
            options.update(nargs="?", const="true")
        if field.many and not field.record:
            options.update(nargs="+", action="append")
            if name.endswith("s"):      # the singular is accepted too
                parser.add_argument(name[:-1], dest=field.name, help=argparse.SUPPRESS, **options)
        text = help_text(field) if are_shown else argparse.SUPPRESS
        groups.get(field.group, parser).add_argument(name, help=text, **options)


def help_text(field):
    """The help of a flag: meaning, values, whether it must be given, an example."""
    text = field.help
    if field.choices:
        text += ": " + " ".join(field.choices)
    if field.required:
        text += " (required)"
    if field.example and field.kind not in ("boolean", "record"):
        text += "; e.g. " + field.example
    return text.replace("%", "%%")


def json_examples(fields):
    """The flags that take JSON lists with an example of each, as they can be pasted."""
    lines = []
    for field in fields:
        if field.record:
            lines.append(f"  {flag_name(field.name)} {field.example}")
    if not lines:
        return ""
    return "JSON, as a word or in a file (@FILE):\n" + "\n".join(lines) + "\n\n"


def inner_commands(path):
    """The commands that begin with this word; without one, or after runs, those of one word."""
    if path in ("", "runs"):
        own = {"check"} if path else set()      # check is about the station: no command of runs
        return [name for name in COMMANDS if " " not in name and name not in own]
    return [name for name in COMMANDS if name.startswith(path + " ")]


def parse(argv):
    """The Call of a command line; BadInput for what is wrong."""
    found, words = Parser().parse_known_args(argv)
    path = getattr(found, "entry", "")
    family = getattr(found, " word", None) or ""
    found = {name: value for name, value in vars(found).items() if name.isidentifier()}
    found.pop("entry", None)
    command = COMMANDS.get(path)
    fields = GLOBAL.fields
    if command:
        fields = command.fields + fields
    refuse_unknown_flags(path, fields, words, argv)
    if not command:
        names = inner_commands(family)
        raise BadInput("a command is missing", "one of: " + ", ".join(names))
    refuse_columns_apart(command, found, words, argv)
    for field in fields:
        if field.name in found and field.many and not field.record:
            found[field.name] = [word for words_given in found[field.name] for word in words_given]
    if words and command.word_field:
        take_words(command, found, words)
    elif words and not command.words:
        shown = printable(words[0], 60)
        raise BadInput(f"unexpected word {shown}", hint_for_word(path, words[0]))
    arguments = Arguments(found, words, fields)
    check_own_flags(path, arguments)
    return Call(path, arguments)


def check_own_flags(path, arguments):
    """Refuses wrong values of flags that are no part of a request, and empty ones of all others.

    What a create says is left to its checks: a queue stores it, whatever is wrong with it.
    """
    content = ()
    if path in ("create", "queue fix"):
        content = ("attach", *CREATE.names)
    for name, value in arguments.flags.items():
        flag = flag_name(name)
        if value == []:     # before 3.13 argparse drops the word --
            raise BadInput(f"{flag}: -- is not a value")
        if name in content:
            continue
        field = arguments.fields[name]
        is_own = field.kind in OWN_KINDS
        if is_own or name in GLOBAL.by_name:
            arguments.get(name)
        if field.kind not in TELL_EMPTY:
            refuse_empty(flag, value)


def refuse_empty(flag, value):
    words = value
    if not isinstance(value, list):
        words = [value]
    for word in words:
        text = str(word)
        if not text.strip():
            raise BadInput(f"{flag}: is empty")


def refuse_unknown_flags(path, fields, words, argv):
    known = {flag_name(field.name): field for field in fields}
    for word in words:
        word = word.partition("=")[0]
        if not word.startswith("-") or word == "-" or word in known:
            continue
        meant = closest(word, list(known))
        if word == "-o" and set(argv) & set(FORMATS):
            meant = "--format"
        hint = f"{PROG} {path}".strip() + " --help lists them"
        if meant:
            example = f"{path} {meant} {known[meant].example}".strip()
            hint = f"did you mean {meant}? Example: {example}"
        is_singular_known = word[:-1] in known
        if not is_singular_known:
            hint = hint_for_flag(path, word) or hint
        raise BadInput(f"unknown option {printable(word, 60)}", hint)


def hint_for_flag(path, word):
    """What to do where a flag belongs to another command, or None."""
    filters = filters_of_ls()
    flag = word
    if word not in filters:
        flag = word + "s"
    if path in ("get", "rm") and flag in filters:
        return (f"{path} takes IDs, and ls finds them: {PROG} ls {flag} ... -q > ids.txt,\n"
                f"then {PROG} {path} --ids @ids.txt")
    changes_run = path in ("update", "update-metadata", "create-attachment")
    if changes_run and flag == "--serial-numbers":
        return f"{path} takes an ID, and {PROG} ls {flag} SN-0001 -q prints it"
    if changes_run and word[2:].replace("-", "_") in CREATE.by_name:
        return (f"results cannot be changed, metadata can: {PROG} update-metadata RUN_ID "
                "--set key=value")
    if path in ("ls", "get") and word == "--set":
        return f"{path} changes nothing: {PROG} update-metadata RUN_ID --set key=value does"
    return None


def filters_of_ls():
    """The flags that say which runs ls lists."""
    own = [field for field in COMMANDS["ls"].fields if field.group != "output"]
    return [flag_name(field.name) for field in own]


def refuse_columns_apart(command, found, words, argv):
    """--columns takes one word: a further one that names a column is no ID."""
    if not words or "--columns" not in argv:
        return
    after = argv[argv.index("--columns") + 2:]
    if not after or after[0] not in words:
        return
    word = after[0].strip(",")
    is_path = re.fullmatch(r"(unit|procedure|metadata)\.[\w.]+", word)
    if is_path or word in RUN_CSV_COLUMNS + MEASUREMENT_COLUMNS or not command.words:
        columns = [found["columns"]] + words[words.index(after[0]):]
        together = ",".join(column.strip(",") for column in columns)
        raise BadInput(f"--columns: {printable(word, 60)} stands apart",
                       f"commas and no spaces: --columns {printable(together, 300)}")


def take_words(command, found, words):
    """Plain words in place of the flag that they stand for; both are refused."""
    name = command.word_field
    if name in found:
        flag = flag_name(name)
        shown = printable(words[0], 60)
        raise BadInput(f"{flag} and the plain word {shown} cannot be combined",
                       "give the ID once")
    fields = Record(*command.fields).by_name
    if fields[name].many:
        found[name] = list(words)
    elif len(words) == 1:
        found[name] = words[0]
    else:
        shown = printable(words[1], 60)
        hint = "this command takes one ID"
        if "set" in fields:
            hint = f"metadata is given as --set {shown}"
        elif "file" in fields:
            hint = f"a file is given as --file {shown}, one at a time"
        raise BadInput(f"unexpected word {shown}", hint)
    words.clear()


def hint_for_word(path, word):
    """What somebody meant who wrote a word without its flag."""
    if path == "create":
        if word.endswith(".json"):
            return f"a file is given as --body @{word}"
        if names_a_file(word):
            return f"a file is given as --attach {word}, a request as --body @{word}"
    elif "queue" in [field.name for field in COMMANDS[path].fields]:
        return f"the queue is given as --queue {word}"
    return f"values follow their flag: {PROG} {path} --help lists the flags"


# ---- main ----------------------------------------------------------------------------------------

def execute(argv):
    """Runs a command line and writes its result. Returns the exit status."""
    if argv[:1] == ["help"]:
        argv = argv[1:] + ["--help"]
    if argv == ["--version"]:
        for name, text in version_facts():
            sys.stdout.write(f"{name:<8} {text}\n")
        return 0
    if not argv:
        sys.stderr.write(summary_text())
        return 2
    call = parse(argv)
    catch_signals()
    try:
        return run_and_write(call)
    except (Exception, KeyboardInterrupt) as error:
        if call.queued_exit_code is not None:      # a run that is stored stays stored
            drop_stdout()
            return call.queued_exit_code
        error.command = call.name
        raise
    finally:
        call.close()


def run_and_write(call):
    out = call.get("out")
    if out:
        refuse_target(call, out)
    result = COMMANDS[call.name].run(call)
    is_dry = call.is_dry_run and call.client_made
    if is_dry:
        for _ in result.windows if result else ():
            pass        # what is asked for while it is shown
        requests = call.client_made.transport.requests
        result = Result.text({}, [dump_json(request) for request in requests])

    def write(stream):
        screen = Screen(stream, call.format, call.get("columns"), call.is_quiet, call.console.warn)
        if is_dry:
            screen = Screen(stream)     # a line for each request, whatever the format
        screen.write(result)
    try:
        if out and out not in ("-", "/dev/stdout"):
            write_file(out, write)
        else:
            write(sys.stdout)
    except (OSError, Error) as error:
        if call.name == "create" and isinstance(result.document, dict):
            error.id = result.document.get("id")
        raise
    error = result.error() if callable(result.error) else result.error
    if error:
        raise error
    return result.exit_status()


def refuse_target(call, out):
    """BadInput for an --out that cannot be, before anything is sent."""
    path = os.path.realpath(local_path(out))
    if path in queue_files(call):
        raise BadInput(f"--out: {printable(out)} is the queue itself", "name another file")
    if os.path.isdir(path):
        raise BadInput(f"--out: {printable(out)} is a folder", "name a file in it")
    folder = os.path.dirname(path)
    if not is_windows_device(path) and not os.path.isdir(folder):
        raise BadInput(f"--out: there is no folder {printable(folder)}",
                       "make it first, or name another one")


def is_windows_device(path):
    """Whether it is such as NUL, which Python 3.6 does not find there."""
    return path.startswith("\\\\.\\")


def catch_signals():
    """Ctrl-C and SIGTERM raise from now on, where nobody else has a handler for them."""
    def stop(number, _):
        sys.unraisablehook = lambda _: None     # 3.8+: objects half made would print a traceback
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
    with contextlib.suppress(ValueError):       # not in the main thread
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, stop)


def write_file(path, write):
    """write(stream) into a file beside this one, renamed at the end: a failure leaves the old."""
    path = os.path.realpath(local_path(path))
    is_special = os.path.exists(path) and not os.path.isfile(path)      # a device, a FIFO: as it is
    if is_special or is_windows_device(path):
        with open(path, "wb") as file:
            write_text_or_bytes(file, write)
        return
    try:
        with new_part(path) as (part, file):
            if os.path.isfile(path):
                os.chmod(part, stat.S_IMODE(os.stat(path).st_mode) | stat.S_IWUSR)
            write_text_or_bytes(file, write)
            file.close()
            replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_text_or_bytes(file, write):
    """write(stream) into a binary file; its text goes as UTF-8."""
    import io
    stream = io.TextIOWrapper(file, "utf-8", newline="")
    write(stream)
    stream.flush()
    stream.detach()


def prepare_streams():
    """stdout and stderr that exist and never fail on a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, open(null, "w", closefd=False))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        elif hasattr(stream, "buffer"):     # Python 3.6
            import io
            setattr(sys, name, io.TextIOWrapper(stream.buffer, stream.encoding,
                                                "backslashreplace", line_buffering=True))


def is_closed_pipe(error):
    """Whether the reader of stdout is gone. Windows says EINVAL, as it does for a wrong name."""
    import errno
    if error.errno == errno.EINVAL:
        return ON_WINDOWS and error.filename is None
    return error.errno == errno.EPIPE


def stopped_error(stopped):
    """The Error of a Ctrl-C or SIGTERM: it tells whether a run is stored."""
    name, exit_code = "Ctrl-C", 130
    if isinstance(stopped, Terminated):
        name, exit_code = "SIGTERM", 143
    failure = Stopped(f"stopped by {name}")
    failure.exit_code = exit_code
    failure.id = getattr(stopped, "id", None)
    if getattr(stopped, "command", None) == "create":
        where = f"run {failure.id} is stored" if failure.id else "the run may be stored"
        failure.message += f"; {where}: the same command again makes no second run"
    return failure


def unexpected_error(error):
    """The Error of a bug; where it happened is told without a traceback."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return Error(f"unexpected {type(error).__name__}: {error} (line {trace.tb_lineno})",
                 f"this is a bug: report it with the output of {PROG} --version")


def tell_failure(failure, argv):
    """Writes an error to stderr, as JSON if a word of the command line asks for that."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if failure.id and failure.id not in failure.text:
        failure.with_note(f"run {failure.id} is stored")
    if asks_for_json(argv):
        text = dump_json(failure.as_json())
    else:
        text = error_text(failure)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def asks_for_json(argv):
    """Whether a command line, which may be wrong, has --json or --format json as its own words."""
    words = [word.lower() for word in argv]
    if "--json" in words or "--format=json" in words:
        return True
    for number, word in enumerate(words):
        if word == "--format" and words[number + 1:number + 2] == ["json"]:
            return True
    return False


def main(argv=None):
    """The command line. Returns the exit status."""
    prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    if sys.version_info < (3, 7):       # without a locale it reads argv as ASCII
        argv = [os.fsencode(word).decode("utf-8", "surrogateescape") for word in argv]
    try:
        try:
            exit_code = execute(argv)
        except SystemExit as ended:     # argparse, after its help
            exit_code = ended.code or 0
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt as stopped:
        failure = stopped_error(stopped)
    except OSError as error:
        drop_stdout()
        if is_closed_pipe(error):
            return 0        # whoever read the output has what they wanted
        failure = Error(f"cannot write: {error}", "make room, or check the path")
        failure.id = getattr(error, "id", None)
    except Error as error:
        failure = error
    except Exception as error:
        failure = unexpected_error(error)
    tell_failure(failure, argv)
    return failure.exit_code


if __name__ == "__main__":
    os._exit(main())    # all is flushed; a thread may still wait for a server or for DNS
