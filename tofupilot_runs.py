#!/usr/bin/env python3
"""Everything of `tofupilot runs` in one file: list, read, create and delete the test runs of a
TofuPilot server, attach files to them, and keep them in a queue while the network is away.

Nothing to install: copy this file to any machine that has Python 3.6 or newer and start with

    python3 tofupilot_runs.py --help

As a module it has `Client` and the errors it raises. The rooms of this file, in the order in
which a command flows, each using only those above it: identity, errors (the type says what a
caller can do next), values (text to wire and back), fields (one table of flags, requests, checks
and help), login, transport (one kept connection per host; is it the API speaking?), client,
attaching, queue (one SQLite file), output, commands (each returns a Result, which execute
writes), command line.
"""
f"tofupilot_runs.py needs Python 3.6 or newer: run it with python3 (Python 2 shows this line)"

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main is ready: no traceback

import argparse
import collections
import contextlib
import datetime
import json
import math
import os
import re
import stat
import sys
import time


# ---- identity ------------------------------------------------------------------------------------

__version__ = "1.0.0"
__all__ = ["Client", "Error", "BadInput", "AccessDenied", "NotFound", "Refused", "Unavailable"]

PROG = "tofupilot_runs.py"
CLOUD = "https://www.tofupilot.app"
ANSWER_LIMIT, ERROR_LIMIT = 64 << 20, 64 << 10      # bytes of an answer, of one that is an error
BLOCK = 64 << 10            # bytes of a file in memory; a socket's time-out counts for a block
PATIENCE = 60               # seconds that the waits of one direct command may add up to
CONNECT = 10                # seconds for each address of a host
LONGEST_WAIT = 3600         # seconds between two tries, in the queue too
UPLOAD_WINDOW = 45          # seconds in which a PUT must begin: upload URLs live 60
AGAIN = "run the same command again later: it is safe"


# ---- errors --------------------------------------------------------------------------------------

class Error(Exception):
    """Something failed. `message` says what and why, `hint` what to do next.

    `status` is the HTTP status or None, `code` the server's word, `issues` the list of single
    problems, `id` the run's ID where a run was stored all the same, `cursor` where a listing that
    broke off can go on, `sent` whether the request may have arrived all the same.
    """
    exit_code, id, cursor, sent = 1, None, None, False

    def __init__(self, message, hint="", status=None, code=None, issues=()):
        super().__init__(message)
        self.message, self.hint, self.status, self.code = message, hint, status, code
        self.issues = list(issues)

    def __str__(self):
        return "\n  ".join([self.message] + self.issues)

    def as_json(self):
        """The object that --json prints on stderr."""
        found = {"type": "error", "message": self.message, "code": self.code,
                 "status": self.status, "issues": self.issues, "exit_code": self.exit_code,
                 "hint": self.hint or None}
        return dict(found, id=self.id) if self.id else found

    def as_text(self):
        """What people read: what failed, why, what to do next."""
        lines = self.message.split("\n") + [shown(issue, 500) for issue in self.issues[:20]]
        if len(self.issues) > 20:
            lines.append(f"and {len(self.issues) - 20} more (all of them with --json)")
        lines += ["Fix: " + line if number == 0 else "  " + line
                  for number, line in enumerate(self.hint.split("\n")) if line]
        return "error: " + "\n  ".join(shown(line) for line in lines)


class BadInput(Error):
    """Wrong usage or bad data; nothing was sent. Fix the call."""
    exit_code = 2


class AccessDenied(Error):
    """No key, or one that is not accepted or not allowed to (401, 403). Fix the key."""
    exit_code = 3


class NotFound(Error):
    """No such run, upload, queue entry or queue file (404). Fix the ID.

    `unsure`: an earlier try got no answer; it may be the one that deleted.
    """
    exit_code, unsure = 4, False


class Refused(Error):
    """The server refused the data (other 4xx). Fix the data."""
    exit_code = 5


class Unavailable(Error):
    """Network, TLS, overload, or not the API's answer. The same call again later is safe.

    `again` is False where trying again at once is useless; `stale`: a kept connection had died;
    `retry_after`: seconds that the server asks for.
    """
    exit_code = 6
    sent, again, stale, retry_after = True, True, False, None


class NotTheAPI(Unavailable):
    """What answered is not the API: a login portal, a proxy, a redirect."""
    again = False


class Stopped(Error):
    """Ctrl-C, SIGTERM (143), or a question answered with no."""
    exit_code = 130


class Terminated(KeyboardInterrupt):
    """SIGTERM: no handler of errors may take it for one."""


# ---- values --------------------------------------------------------------------------------------

# patterns as text: compiled where they are used, not at every start
_TIME = (r"(?a)(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d)(?::(\d\d)([.,]\d+)?)?"
         r"(?: ?([Zz]|[+-]\d\d:?\d\d))?")
_ISO_DURATION = (r"(?a)P(?:(\d+)W|(?!.*W)(?=\d|T\d)(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)D)?"
                 r"(?:T(?=\d)(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:[.,]\d+)?)S)?)?)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_IDENTIFIER = r"[a-zA-Z0-9_.:+-]+"
_UTC = datetime.timezone.utc


def shown(value, limit=None, keep=""):
    r"""Text from a server or a file, safe on a terminal: what is not printable is escaped.

    >>> shown("a\x1b[2Jb\n\u202ec")
    'a\\x1b[2Jb\\n\\u202ec'
    """
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if limit and len(text) > limit:
        text = text[:limit] + "..."
    return text if text.isprintable() else "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text)


def load_json(data):
    """JSON from text or bytes (UTF-8, -16, -32, with or without a mark at the start).

    ValueError for what JSON does not know (NaN, 1e999) and for what is too deep to read.
    """
    def number(text):
        value = float(text)
        must(math.isfinite(value), f"{text[:20]} is no number that JSON knows")
        return value
    try:
        return json.loads(data, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("too many brackets inside each other") from None


def dump_json(value, indent=None):
    """JSON as text, ASCII only, so that no stream can fail on it."""
    return json.dumps(value, indent=indent, allow_nan=False)


def must(holds, why):
    """ValueError(why) unless it holds; who calls adds the name of the field, or the hint."""
    if not holds:
        raise ValueError(why)


def parse_time(text, now=None):
    """A time as the API takes it: ISO 8601 with an offset, every digit of its fraction kept.

    Without an offset it is this machine's local time. With `now` (an aware datetime) also `now`,
    `90s 30m 24h 7d 2w` (that long ago) and a bare date (local midnight).

    >>> parse_time("2026-05-19 08:00:00.250+0200")
    '2026-05-19T08:00:00.250+02:00'
    >>> parse_time("90m", datetime.datetime(2026, 5, 19, 8, tzinfo=_UTC))
    '2026-05-19T06:30:00.000+00:00'
    """
    text = text.strip()
    past = re.fullmatch(r"(\d{1,9})([smhdw])|now", text.lower(), re.A)
    date = re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.A)
    must(now or not past, f"{text} would make each repetition another run: give the whole time")
    must(now or not date, f"give the time of day too, such as {text}T08:00:00Z")
    if past:
        length = int(past.group(1) or 0) * _SECONDS[past.group(2) or "s"]
        return (now - datetime.timedelta(seconds=length)).isoformat(timespec="milliseconds")
    match = re.fullmatch(_TIME, text + "T00:00" if date else text)
    must(match, "not a time: use 2026-05-19T08:00:00Z, with any offset"
         + (", or 24h, or now" if now else ""))
    *parts, fraction, offset = match.groups("")
    local = datetime.datetime(*(int(part or 0) for part in parts))
    if not offset:
        offset = local.astimezone().isoformat()[19:25]
    elif offset not in "Zz":
        offset = offset[:3] + ":" + offset[-2:]
        must(offset[1:3] <= "23" and offset[4:] <= "59", f"{offset} is no offset")
    found = local.isoformat() + fraction.replace(",", ".") + offset.upper()
    moment(found)       # OverflowError where UTC has no such year
    return found


def moment(text):
    """(whole second in UTC, further digits) of a time with offset."""
    *parts, fraction, offset = re.fullmatch(_TIME, text).groups("")
    when = datetime.datetime(*(int(part or 0) for part in parts), tzinfo=_UTC)
    if offset not in "Zz":
        when -= datetime.timedelta(hours=int(offset[:3]), minutes=int(offset[0] + offset[-2:]))
    return when, fraction[1:].rstrip("0")


def instant(text):
    """The instant of a time with offset, in UTC, one spelling for one instant.

    >>> instant("2026-05-19T08:00:00.2500+02:00")
    '2026-05-19T06:00:00.25Z'
    """
    when, digits = moment(text)
    return when.isoformat()[:19] + (digits and "." + digits) + "Z"


def epoch(text):
    """Seconds since 1970 of a time with offset, or None for anything else."""
    try:
        when, digits = moment(text)
        return when.timestamp() + float("0." + digits)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None


def parse_duration(text):
    """A length of time as ISO 8601, from ISO 8601 or from 90s, 1h30m, 2d.

    >>> parse_duration("1h30m"), parse_duration("PT1M30S")
    ('PT5400S', 'PT1M30S')
    """
    text = text.strip()
    if re.fullmatch(_ISO_DURATION, text.upper()):
        return text.upper()
    must(re.fullmatch(r"(?:\d{1,9}(?:\.\d+)?[smhdw])+", text, re.A),
         "not a duration: use 90s, 1h30m or PT1M30S")
    total = sum(float(part[:-1]) * _SECONDS[part[-1]] for part in re.findall(r"[\d.]+.", text))
    return "PT" + f"{total:.3f}".rstrip("0").rstrip(".") + "S"


def duration_text(iso):
    """What people write for an ISO 8601 duration; what cannot be read comes back as it is.

    >>> duration_text("PT1M35S"), duration_text("PT0.25S"), duration_text("P1DT2H")
    ('1m 35s', '0.25s', '1d 2h')
    """
    match = isinstance(iso, str) and re.fullmatch(_ISO_DURATION, iso)
    if not match or match.group(2) or match.group(3) or len(iso) > 40:
        return "" if iso is None else shown(iso)
    return seconds_text(sum(float(part.replace(",", ".")) * size for part, size in zip(
        match.groups("0"), (604800, 0, 0, 86400, 3600, 60, 1))))


def seconds_text(total):
    """1m 35s, 4.2s, 3h 5m: two units at most."""
    if total < 59.95:
        return f"{total:.3g}s"
    total = round(total)
    parts = [f"{total // 86400}d", f"{total // 3600 % 24}h", f"{total // 60 % 60}m",
             f"{total % 60}s"]
    while parts[0][0] == "0":
        parts.pop(0)
    return " ".join(part for part in parts[:2] if part[0] != "0")


def counted(count, word):
    """1 run, 2 runs."""
    return f"{count} {word}" + ("" if count == 1 else "s")


def size_text(size):
    """184 KB, 1.8 MB.

    >>> size_text(999), size_text(1840000)
    ('999 B', '1.8 MB')
    """
    if not is_number(size):
        return "size unknown"
    for unit in ("B", "KB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(value):
    """A value of the module's caller as JSON: datetimes with offset, tuples as lists."""
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.astimezone()).isoformat()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def digest(blocks):
    import hashlib
    found = hashlib.sha256()
    for block in blocks:
        found.update(block)
    return found.hexdigest()


def parse_word(text):
    """The value of `--set key=value`: what JSON writes just so (12, true, null, "1"), else text.

    >>> [parse_word(word) for word in ("12", "1.10", "true", "null", "A", "007", '"1.1"')]
    [12, '1.10', True, None, 'A', '007', '1.1']
    """
    with contextlib.suppress(ValueError):
        value = load_json(text)
        if isinstance(value, str) or dump_json(value) == text and text[0] not in "[{":
            return value
    return text


def local_path(text):
    """A path of the command line as the system's functions want it: see main about Python 3.6."""
    return text if sys.version_info >= (3, 7) else os.fsdecode(
        text.encode("utf-8", "surrogateescape"))


def dig(value, path):
    """What stands at a dotted path of nested dicts, or None."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def dicts(value):
    """The dicts of a list; an odd value has none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def closest(word, known):
    """The known word that was meant, or None: difflib finds it, but for these."""
    import difflib
    usual = dict(pair.split("=") for pair in """delete=rm remove=rm show=get add=create
        upload=create-attachment attach=create-attachment status=check --sn=--serial-number
        --part=--part-number --batch=--batch-number --since=--started-after --after=--started-after
        --before=--started-before --until=--started-before --station=--created-by-station-id
        --user=--created-by-user-id --operator=--operated-by --key=--api-key-file --file=--attach
        --host=--url --server=--url""".split()).get(word, "")
    guesses = [usual, usual + "s", usual + "-ids"] + difflib.get_close_matches(word, known, 1)
    return next((guess for guess in guesses if guess in known), None)


# ---- fields --------------------------------------------------------------------------------------
#
# One row for each field of a request: it makes the flag, its help, the module's keyword argument,
# the check and the place in the request. A row is "name kind choices | help | example"; rows stand
# on lines below the title of their group in the help, short ones on one line with / between. After
# the kind: * a list, ! required, ? null is allowed.
#
# A kind is a branch of check_value. Those that look alike: `time` is a whole time and `when` also
# 24h or now; `id` is the server's, `serial` a text to look for, `identifier` a name that the server
# makes an object of; `record` has the fields of _records, `object` any, `metadata` up to 50 keys.

Field = collections.namedtuple(
    "Field", "name kind many need null group help example choices fields")
Operation = collections.namedtuple("Operation", "method path fields answer_keys")


_records = {}       # the Fields of the JSON objects inside a request, by the field that has them


def _table(text):
    """The Fields of a text."""
    fields, title = [], ""
    for row in text.replace(" / ", "\n").split("\n"):
        if row.endswith(":"):
            title = row[:-1]
        elif row:
            spec, help, example = (row.split(" | ") + ["", ""])[:3]
            name, kind, *choices = spec.split()
            fields.append(Field(name, kind.rstrip("*!?"), "*" in kind, "!" in kind, "?" in kind,
                                title, help, example, tuple(choices), _records.get(name, ())))
    return tuple(fields)


ID = _table("which run: / id id! | the run's ID | run_abc123")
NAME = _table(
    "file: / name name! | file name with its extension, up to 255 characters | report.pdf")
LIST = _table("""
which runs:
  search_query text | part of a serial number, or the beginning of a run ID | PCB01
  ids id* | run IDs, or @FILE or - with one a line | run_abc run_def
  outcomes enum* PASS FAIL ERROR TIMEOUT ABORTED | results | FAIL ERROR
  procedure_ids id* | procedure IDs | proc_abc
  procedure_versions text* | version tags of procedures | 1.2.3
  deployment_ids id* | deployments that the runs came from | dep_abc
  environments enum* production preview development | environments of those deployments | production
  execution_ids text* | executions of several slots | exec-7f3a
  slot_keys text* | keys of fixture slots | slot-1
  slot_names text* | names of fixture slots | 'Left nest'
unit:
  serial_numbers serial* | serial numbers, or @FILE or - with one a line | SN-0001 SN-0002
  samples enum* production golden failing ignored | kinds of unit | golden
  part_numbers text* | part numbers | PCB01
  revision_numbers text* | revisions | B
  batch_numbers text* | batches | 2026-W20
when:
  duration_min duration | at least this long: 90s, 1h30m or PT1M30S | 90s
  duration_max duration | at most this long | 5m
  started_after when | started at or after: ISO 8601, 24h ago, now | 24h
  started_before when | started at or before | 2026-05-19
  ended_after when | ended at or after | 2026-05-19T08:00:00+02:00
  ended_before when | ended at or before | 2026-05-19T16:00
  created_after when | stored on the server at or after | 7d
  created_before when | stored on the server at or before | now
who:
  created_by_user_ids id* | users who uploaded | user_abc
  created_by_station_ids id* | stations that uploaded | station_abc
  operated_by_ids id* | operators with an account | user_abc
  operated_by_names text* | names of operators | 'Night shift'
metadata:
  metadata object | JSON: key, then in or contains (text), gte lte gt lt eq (number), eq (true, \
false) | '{"shift":{"in":["A"]}}'
  include_metadata boolean | metadata in each row | --include-metadata
  include_sequences boolean | sequences in each row | --include-sequences
page and order:
  limit limit | rows wanted (50 if not given) | 200
  cursor integer | number of rows to leave out first | 100
  sort_by enum started_at created_at duration outcome serial_number part_number revision_number | \
order by (started_at if not given) | duration
  sort_order enum asc desc | direction (desc if not given) | asc
""")

# the JSON objects inside a create, the innermost first; fields with the same rows share a line
for _line in """\
validators: outcome enum? PASS FAIL UNSET / operator text? / expected_value any? / \
expression text? / is_decisive boolean?
aggregations: type text! / outcome enum? PASS FAIL UNSET / value scalar? / unit text? / \
validators record*?
x_axis y_axis: data number*! / units text? / name text? / description text? / \
validators record*? / aggregations record*?
measurements: name text! / outcome enum! PASS FAIL UNSET / measured_value any? / units units? / \
x_axis record? / y_axis record*? / lower_limit number / upper_limit number / \
validators record*? / aggregations record*? / docstring text?
phases: name text! / outcome enum! PASS FAIL SKIP ERROR / started_at time! / ended_at time! / \
docstring text? / measurements record*? / retry_count count / sequence_path text?
sequences: path text! / name text! / outcome enum! PASS FAIL ERROR TIMEOUT ABORTED SKIP / \
source text? / started_at time? / ended_at time?
logs: level enum! DEBUG INFO WARNING ERROR CRITICAL / timestamp time! / message text! / \
source_file text! / line_number integer!
secrets: key text! / variable_id text? / version integer? / \
source enum default shell dotenv process station procedure organization""".split("\n"):
    _names, _, _rows = _line.partition(": ")
    _records.update(dict.fromkeys(_names.split(), _table(_rows)))
_records["config"] = _table("value scalar!") + _records["secrets"]

CREATE = _table("""
which run:
  outcome enum! PASS FAIL ERROR TIMEOUT ABORTED | result | PASS
  procedure_id id! | the procedure | proc_abc
  procedure_version identifier? | its version tag, made when missing | 1.2.3
  deployment_id id? | the deployment it ran from | dep_abc
  execution_id text? | joins the runs of several slots | exec-7f3a
  slot_key text? | fixture slot, needs --execution-id | slot-1
  slot_name text? | its name, needs --slot-key | 'Left nest'
  client_run_ref text | your own reference instead of the one made from the content; the same \
reference is the same run | station7-000042
unit:
  serial_number identifier! | the unit under test, made when missing | SN-0001
  part_number identifier | its part, where the serial number does not tell | PCB01
  revision_number identifier | its revision | B
  batch_number identifier | its batch | 2026-W20
  sub_units identifier* | serial numbers of the units inside | PSU-1 FAN-2
when:
  started_at time! | begin: ISO 8601; without offset it is local | 2026-05-19T08:00:00Z
  ended_at time! | end, not before the begin | 2026-05-19T08:00:42Z
who:
  operated_by text | operator: an e-mail address or a name | ada@example.com
content:
  docstring text | a note | 'second try'
  phases record* | JSON list of phases with measurements | @phases.json
  sequences record*? | JSON list of sequence calls | @sequences.json
  logs record* | JSON list of log lines | @logs.json
  config record* | JSON list of configuration values used | @config.json
  secrets record* | JSON list of secrets used, never their values | @secrets.json
metadata:
  metadata metadata | JSON object, up to 50 keys | '{"shift":"A","temp":23.4}'
  unit_metadata metadata | the same, for the unit | @unit.json
""")

OPERATIONS = {      # answer_keys: texts that an answer must hold, else it is not the API's
    "list": Operation("GET", "/v2/runs", LIST, ""),
    "get": Operation("GET", "/v2/runs/{id}", ID, "id"),
    "create": Operation("POST", "/v2/runs", CREATE, "id"),
    "update": Operation("PATCH", "/v2/runs/{id}", ID + _table(
        "files: / attachments id* | IDs of uploads to link | att_1 att_2"), "id"),
    "update_metadata": Operation("PATCH", "/v2/runs/{id}/metadata", ID + _table(
        """metadata: / metadata metadata | JSON object; null deletes a key \
| '{"shift":"A","lot":null}'"""), "id"),
    "create_attachment": Operation("POST", "/v2/runs/{id}/attachments", ID + NAME, "id upload_url"),
    "delete": Operation("DELETE", "/v2/runs", _table(
        "which runs: / ids id*! | run IDs, or @FILE or - with one a line | run_a run_b"), ""),
    "initialize": Operation("POST", "/v2/attachments", NAME, "id upload_url"),
    "finalize": Operation("POST", "/v2/attachments/{id}/finalize", _table(
        "which upload: / id id! | the upload's ID | att_1"), "url"),
    "whoami": Operation("GET", "/v2/whoami", (), ""),
}


def flag(name):
    """--serial-number for serial_number, -v for v."""
    return ("--" if len(name) > 1 else "-") + name.replace("_", "-")


_TEXT = "text serial id identifier name enum time when duration".split()
_BOUNDS = {"integer": (-math.inf, math.inf, ""), "count": (0, math.inf, "must be 0 or more"),
           "limit": (1, math.inf, "must be 1 or more"), "page": (1, 100, "must be 1 to 100")}


def check_value(field, value):
    """One value as the API takes it; ValueError says what is wrong with it."""
    kind = field.kind
    must(isinstance(value, str) or kind not in _TEXT, "must be text")
    if kind == "id":
        must(value.strip() not in ("", ".", ".."), f"{value!r} is no ID" if value else "is empty")
    elif kind == "identifier":
        value = value.strip()
        must(1 <= len(value) <= 60, "must have 1 to 60 characters")
        wrong = " ".join(sorted(map(repr, set(re.sub(_IDENTIFIER, "", value)))))
        must(not wrong, f"the server takes letters, digits and _ . : + - only, not {wrong}")
    elif kind == "path":
        must(value, "is empty")
        return local_path(value)
    elif kind == "name":
        must(1 <= len(value) <= 255, "must have 1 to 255 characters")
    elif kind == "enum":
        words, word = {choice.lower(): choice for choice in field.choices}, value.strip().lower()
        if word not in words:
            meant = closest(word, list(words))
            raise ValueError(f"{value[:60]!r} is not one of {' '.join(field.choices)}"
                             + (f"; did you mean {words[meant]}?" if meant else ""))
        value = words[word]
    elif kind in ("time", "when"):
        now = datetime.datetime.now().astimezone() if kind == "when" else None
        value = parse_time(value, now)
    elif kind == "duration":
        value = parse_duration(value)
    elif kind in _BOUNDS:
        if isinstance(value, str) and re.fullmatch("-?[0-9]{1,15}", value.strip()):
            value = int(value)
        must(isinstance(value, int) and not isinstance(value, bool), "must be a whole number")
        least, most, why = _BOUNDS[kind]
        must(least <= value <= most, why)
    elif kind == "seconds":
        must(re.fullmatch(r"\d{1,6}(\.\d+)?", value) and float(value),
             "must be a number, above 0 and below 1000000")
        value = float(value)
    elif kind == "boolean":
        must(str(value).lower() in ("true", "false"), "must be true or false")
        value = str(value).lower() == "true"
    elif kind == "number" or kind == "scalar" and not isinstance(value, (str, bool)):
        must(is_number(value) and math.isfinite(value), "must be a number")
    elif kind == "units" and not isinstance(value, str):
        must(isinstance(value, list) and all(isinstance(unit, str) for unit in value),
             "must be text")
    elif kind in ("object", "metadata"):
        must(isinstance(value, dict), "must be a JSON object")
        if kind == "metadata":
            check_metadata(value)
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeError:
        raise ValueError("is not text that UTF-8 can write") from None
    except (TypeError, ValueError, RecursionError):
        raise ValueError("cannot be sent (NaN, Infinity or an object of Python)") from None
    return value


def check_metadata(value):
    must(len(value) <= 50, f"has {len(value)} keys, the server takes 50")
    for key, item in value.items():
        name = repr(key)[:60]
        must(isinstance(key, str) and len(key) <= 40 and re.fullmatch(_IDENTIFIER, key),
             f"key {name}: 1 to 40 letters, digits and _ . : + - only")
        must(item is None or isinstance(item, (str, int, float)),
             f"{name}: must be text, a number, true or false")
        must(not isinstance(item, str) or len(item) <= 50000,
             f"{name}: is longer than 50,000 characters")


_UNKNOWN, = _table("unknown any?")      # a newer server may know it: it is sent on


def check_record(fields, value, path, problems):
    """A JSON object as the API takes it; what is wrong with it is added to problems."""
    prefix, known, wire = path and path + ".", {field.name: field for field in fields}, {}
    for key, item in value.items():
        field, name = known.get(key, _UNKNOWN), f"{prefix}{key}"
        if item is None and field.null:
            wire[key] = None
        elif item is None:
            problems.append(f"{name}: null is not allowed, leave it out")
        elif not field.many:
            wire[key] = check_field(field, item, name, problems)
        elif isinstance(item, list):
            wire[key] = [check_field(field, part, f"{name}[{number}]", problems)
                         for number, part in enumerate(item)]
        else:
            problems.append(f"{name}: must be a list")
    problems += [f"{prefix}{name}: missing" for name, field in known.items()
                 if field.need and (name not in value or field.kind == "id" and not value[name])]
    start, end = epoch(wire.get("started_at")), epoch(wire.get("ended_at"))
    if start is not None and end is not None and end < start:
        problems.append(f"{prefix}ended_at: is before started_at")
    return wire


def check_field(field, value, path, problems):
    try:
        if not field.fields:
            return check_value(field, value)
        must(isinstance(value, dict), "must be a JSON object")
        return check_record(field.fields, value, path, problems)
    except (ValueError, OverflowError, OSError) as error:
        problems.append(f"{path}: {error}")
        return value


def check_create(body, problems):
    """The rules of a create that reach over several fields."""
    for name, needed in (("slot_key", "execution_id"), ("slot_name", "slot_key")):
        if body.get(name) and not body.get(needed):
            problems.append(f"{name}: needs {needed}")
    if "operated_by" in body and not body["operated_by"].strip():
        problems.append("operated_by: is empty")
    if None in list(body.get("metadata", {}).values()):
        problems.append("metadata: null deletes a key, and a new run has none")
    paths = [row["path"] for row in body.get("sequences") or ()]
    for number, path in enumerate(paths):
        parent = path.rpartition("/")[0]
        if path in paths[:number]:
            problems.append(f"sequences[{number}].path: {path} stands twice")
        if parent and parent not in paths:
            problems.append(f"sequences[{number}].path: its parent {parent} is missing")
    problems += [f"phases[{number}].sequence_path: is no path of sequences"
                 for number, row in enumerate(body.get("phases", ()))
                 if row.get("sequence_path") is not None and row["sequence_path"] not in paths]
    problems += [f"secrets[{number}].value: never send the value of a secret"
                 for number, row in enumerate(body.get("secrets", ())) if "value" in row]


def check(operation, values, flags=False):
    """The values of an operation as they go over the wire; BadInput with all problems at once.

    A problem is "path: why", such as phases[1].measurements[0].outcome; with `flags` a field of
    the request itself is named by its flag.
    """
    known = {field.name: field for field in OPERATIONS[operation].fields}
    values = {key: plain(value) for key, value in values.items()}
    values = {key: [value] if isinstance(value, str) and known.get(key, _UNKNOWN).many else value
              for key, value in values.items()}
    problems = [f"{key}: there is no such field" for key in values
                if key not in known and operation != "create"]
    wire = check_record(OPERATIONS[operation].fields, values, "", problems)
    if operation == "create" and not problems:
        check_create(wire, problems)
    if len(wire.get("metadata") or ()) > 5 and operation == "list":
        problems.append("metadata: at most 5 keys can be asked for")
    if flags:
        def named(match):
            whole = match.group(2) and known.get(match.group(1), _UNKNOWN).fields
            return match.group() if whole else flag(match.group(1))
        problems = [re.sub(r"^(\w+)(\[\d+\])?(?=: )", named, problem) for problem in problems]
    if len(problems) == 1:
        raise BadInput(problems[0], "nothing was sent; correct the value")
    if problems:
        raise BadInput(f"{len(problems)} problems in the input, nothing was sent", issues=problems)
    return wire


def run_ref(body):
    """The client_run_ref of a create: SHA-256 of its content, the same in all releases.

    Keys sorted, every time of the table in UTC, without the ref itself.

    >>> run_ref({"started_at": "2026-05-19T10:00:00+02:00"})[:16]
    'd5088dd6c3b9ff9c'
    """
    def normal(value, field):
        if isinstance(value, list):
            return [normal(item, field) for item in value]
        if isinstance(value, dict):
            known = {each.name: each for each in field.fields}
            return {key: normal(item, known.get(key, _UNKNOWN)) for key, item in value.items()}
        return instant(value) if value and field.kind == "time" else value
    content = {key: item for key, item in body.items() if key != "client_run_ref"}
    content = normal(content, OPERATIONS["create"])
    return digest([json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")])


# ---- login ---------------------------------------------------------------------------------------

Login = collections.namedtuple("Login", "url key source slug")


def home():
    """The TofuPilot folder: TOFUPILOT_HOME, else ~/.tofupilot (on Windows below USERPROFILE)."""
    user = os.name == "nt" and os.environ.get("USERPROFILE") or os.path.expanduser("~")
    return os.path.abspath(os.environ.get("TOFUPILOT_HOME") or os.path.join(user, ".tofupilot"))


def check_url(raw, allow_http, what):
    """The parts of an https URL (http where allowed); ValueError for all else, before its use."""
    from urllib.parse import urlsplit
    must(isinstance(raw, str) and re.fullmatch(r"[!-\[\]-~]+", raw),
         f"{what} holds spaces or other characters that no URL has")
    parts = urlsplit(raw)
    must(parts.scheme in ("https", "http") and parts.hostname, f"{what} must begin with https://")
    must("@" not in parts.netloc, f"{what} must not hold a user name or password")
    must(parts.port != 0, f"{what} has no such port")      # and raises where it is no number
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    must(parts.scheme == "https" or allow_http or here,
         f"{what} is plain http: others can read the key on the way.\n"
         "Use https, or --allow-http where the network is trusted")
    return parts


def parse_origin(text, allow_http=False, what="--url"):
    """https://host[:port] of a server's address, with or without /api at its end.

    >>> parse_origin("https://tofupilot.example.com/api/")
    'https://tofupilot.example.com'
    """
    try:
        parts = check_url(text, allow_http, what)
        must(parts.path.rstrip("/") in ("", "/api") and not parts.query + parts.fragment,
             f"{what} must be the address of the server alone, such as {CLOUD}")
    except ValueError as error:
        raise BadInput(str(error), f"give an address such as {CLOUD}") from None
    return f"{parts.scheme}://{parts.netloc}"


def read_credentials(warn):
    """(path, fields) of the first credentials file that has a key, or (None, {})."""
    for name in ("credentials.json", "station.json"):
        path = os.path.join(home(), name)
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno())
                found = load_json(file.read(ERROR_LIMIT))
            must(isinstance(found, dict) and isinstance(found.get("api_key", ""), str),
                 "it is not a JSON object with a text api_key")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise AccessDenied(f"cannot use {path}: {error}",
                               "repair or remove the file, or log in again") from None
        if os.name != "nt" and (state.st_mode & 0o077 or state.st_uid not in (0, os.getuid())):
            warn(f"{path} can be read by others, or is theirs: chmod 600 it")
        if found.get("api_key"):
            return path, found
    return None, {}


def find_login(url=None, api_key=None, source="api_key", allow_http=False, warn=print):
    """Which server, and the key for it: argument, environment, credentials file, in this order.

    A key from a credentials file goes to that file's base_url or to a URL named by its owner.
    """
    if api_key is None and os.environ.get("TOFUPILOT_API_KEY"):
        api_key, source = os.environ["TOFUPILOT_API_KEY"], "environment TOFUPILOT_API_KEY"
    named = url or os.environ.get("TOFUPILOT_URL")
    origin = named and parse_origin(named, allow_http, "--url" if url else "TOFUPILOT_URL")
    path, found = read_credentials(warn) if api_key is None or not origin else (None, {})
    theirs = found.get("base_url")
    if theirs or path and not origin:       # a key whose server is not known goes nowhere
        theirs = parse_origin(str(theirs).rstrip("/"), allow_http, f"base_url in {path}")
    if api_key is None and path:
        api_key, source = found["api_key"], path
    if api_key is not None:
        api_key = str(api_key).strip()
        if not re.fullmatch("[!-~]{8,512}", api_key):
            raise AccessDenied(f"what {source} holds is no API key ({len(api_key)} characters)",
                               "copy the key again: 8 to 512 letters, digits, signs; no spaces")
    slug = found.get("organization_slug") if theirs == (origin or theirs) else None
    return Login(origin or theirs or CLOUD, api_key, source, slug)


# ---- transport -----------------------------------------------------------------------------------

Answer = collections.namedtuple("Answer", "status headers data")


class Transport:
    """Exchanges with the API and the storage; raises Unavailable where there is no answer.

    It handles http and https for urllib.request, which closes a connection after each request:
    here one is kept per host and proxy. No redirect is followed: there is no handler for them.
    """

    def __init__(self, timeout, ca_cert, trace):
        self.timeout, self.ca_cert, self.trace = timeout, ca_cert, trace
        self.opener = self.context = self.watchdog = None
        self.kept = {}          # connections, by scheme, host and tunnel
        self.clocks = None      # (the server's time, ours) at the last answer, if it told its time

    def close(self):
        while self.kept:
            self.kept.popitem()[1].close()
        if self.watchdog:
            self.watchdog.ended.set()
            self.watchdog = None

    def make_context(self):
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
                raise BadInput(f"--ca-cert {self.ca_cert}: {error.strerror or error}",
                               "name a file of certificates in PEM form") from None
            # 3.13 wants a form that older private CAs do not have; elsewhere it is not set
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        return context

    def new_connection(self, request, proxy_login):
        import http.client
        import socket

        def connect(*args):     # known to the watchdog before the proxy has answered
            self.watchdog.sock = socket.create_connection(*args)
            return self.watchdog.sock
        if request.type == "https":
            self.context = self.context or self.make_context()
            connection = http.client.HTTPSConnection(request.host, context=self.context)
        else:
            connection = http.client.HTTPConnection(request.host)
        connection.timeout = min(CONNECT, request.timeout)
        connection._create_connection = connect
        if request._tunnel_host:
            connection.set_tunnel(request._tunnel_host, headers=proxy_login)
        return connection

    def http_open(self, request):
        """The Answer, for urllib.request; `request.stage` tells how far it came."""
        headers, proxy_login = dict(request.header_items()), {}
        if request._tunnel_host and "Proxy-authorization" in headers:
            proxy_login["Proxy-Authorization"] = headers.pop("Proxy-authorization")
        where = (request.type, request.host, request._tunnel_host)
        connection = self.kept.pop(where, None)
        request.stage = "kept" if connection else "connecting"
        connection = connection or self.new_connection(request, proxy_login)
        try:
            if request.stage == "connecting":
                connection.connect()
                connection.sock.settimeout(request.timeout)
                request.stage = "sent"
            self.watchdog.sock = connection.sock
            try:
                connection.request(request.get_method(), request.selector, request.content, headers)
            except (BrokenPipeError, ConnectionResetError):
                if request.stage == "kept" or not request.content:
                    raise       # else a storage may have refused before it read it all: listen
            with connection.getresponse() as response:
                request.stage = "sent"      # something came back: the kept one was alive
                answer = self.read(request, response)
        except BaseException:
            connection.close()
            raise
        if not response.will_close:
            self.kept[where] = connection
        return answer

    def read(self, request, response):
        """The Answer of a response; the request's sink takes the body of a 200, in blocks."""
        url, status = request.full_url, response.status
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise not_the_api(url, status, "an encoding not asked for")
        limit = ANSWER_LIMIT if status < 300 else ERROR_LIMIT
        pieces, size, sink = [], 0, request.sink if status == 200 else None
        # in blocks: before 3.12 read(n) takes n bytes of memory at once
        for block in iter(lambda: response.read(BLOCK), b""):
            size += len(block)
            if not sink and size > limit:
                raise not_the_api(url, status, f"more than {limit >> 10} KiB")
            try:
                (sink or pieces.append)(block)
            except OSError as error:    # the disk's, not the network's
                raise Error(f"cannot write: {error}", "make room, or check the path") from None
        if response.length or self.watchdog.late:       # a cut body raises nothing
            raise EOFError
        theirs = http_date(response.getheader("Date"))
        self.clocks = theirs and (theirs, time.time())
        return Answer(status, response.headers, b"".join(pieces))

    def exchange(self, method, url, headers, content=None, budget=None, sink=None):
        """The answer to one request. `content` is None, bytes, or a function that makes an
        iterator of it; `sink` takes the blocks of a 200's body. `budget`: seconds for all of it."""
        import urllib.request
        if self.opener is None:
            ours = urllib.request.BaseHandler()
            ours.http_open = ours.https_open = self.http_open
            self.opener = urllib.request.OpenerDirector()
            self.opener.add_handler(urllib.request.ProxyHandler())
            self.opener.add_handler(ours)
        self.watchdog = self.watchdog or Watchdog()
        request = urllib.request.Request(url, headers=headers, method=method)
        request.content = content() if callable(content) else content
        request.stage, request.sink = "connecting", sink
        request.budget = budget or 1.5 * self.timeout
        self.watchdog.start(request.budget)
        started, result = time.monotonic(), None
        try:
            answer = self.opener.open(request, timeout=self.timeout)
            result = answer.status
            return answer
        except Exception as error:      # http.client, ssl and socket have no common ancestor
            result = type(error).__name__
            if isinstance(error, Error):
                raise
            raise no_answer(request, error, self.watchdog.late) from None
        finally:
            self.watchdog.until = math.inf
            if callable(content):
                request.content.close()
            if self.trace:
                path, took = url.split("?")[0], 1000 * (time.monotonic() - started)
                shows = shown(url if path.endswith("/v2/runs") else path)
                self.trace(f"{method} {shows} {result} {took:.0f} ms")


class Watchdog:
    """Ends an exchange that takes too long: no time-out of a socket sees a slow drip."""

    def __init__(self):
        import threading
        self.until, self.sock, self.late, self.ended = math.inf, None, False, threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def start(self, seconds):
        self.sock, self.late, self.until = None, False, time.monotonic() + seconds

    def run(self):
        import socket
        while not self.ended.wait(0.1):
            if time.monotonic() > self.until:
                self.late = True
                with contextlib.suppress(TypeError, OSError):   # not connected yet, or gone already
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


def http_date(text):
    """Seconds since 1970 of a date in a header, or None."""
    from email.utils import mktime_tz, parsedate_tz
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):
        return mktime_tz(parsedate_tz(text))


def no_answer(request, error, late):
    """The Unavailable for an exchange that got no answer: what, why, what to do."""
    import socket
    from urllib.parse import urlsplit
    parts, again = urlsplit(request.full_url), True
    hint = "nothing was sent; run the same command again later"
    if late:
        why = f"no complete answer within {request.budget:.0f} s"
    elif "CERTIFICATE_VERIFY" in str(error) or type(error).__name__ == "CertificateError":
        why = f"its certificate cannot be verified\n{getattr(error, 'verify_message', '') or error}"
        hint = ("--ca-cert FILE (or TOFUPILOT_CA_CERT) adds a private CA. This machine's clock\n"
                f"says {time.strftime('%Y-%m-%d %H:%M')}: if that is wrong, set it first")
        if re.search("(?i)hostname|doesn't match|IP address mismatch", why):
            hint = "name the server in --url as its certificate does"
        again = False
    elif isinstance(error, socket.gaierror):
        why = "name not found (DNS)"
    elif isinstance(error, socket.timeout):
        why = f"no answer within {request.timeout:g} s"
    elif type(error).__name__ in ("EOFError", "IncompleteRead"):
        why = "the answer was cut short"
    else:
        why = (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
    found = Unavailable(f"no answer from {parts.netloc}: {why}", AGAIN)
    if request.stage == "connecting":
        proxy = proxy_of(parts.scheme)
        found = Unavailable(f"cannot reach {parts.netloc}: {why}\nproxy: {proxy}", hint)
        found.sent = False
    found.again, found.stale = again, request.stage == "kept" and not late
    return found


def proxy_of(scheme):
    """The proxy in force, without its password, or none."""
    from urllib.request import getproxies
    return re.sub("//[^/@]*@", "//", getproxies().get(scheme, "none"))


def not_the_api(url, status, what):
    return NotTheAPI(f"{url.split('/')[2]} did not answer as the API does ({status}): {what}",
                     "is --url right? A login page or a proxy may answer in its place", status)


def redirected_to(answer):
    """Where a redirect points to, without what is secret in it."""
    return str(answer.headers.get("Location", "")).split("?")[0][:200]


def retry_after(answer):
    """Seconds that the server asks to wait, or None. At most an hour."""
    text = (answer.headers.get("Retry-After") or "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return min(int(text), LONGEST_WAIT)
    until = http_date(text)
    wait = until and until - (http_date(answer.headers.get("Date")) or time.time())
    return wait and min(max(wait, 0), LONGEST_WAIT)


def delay(tries, unit, asked=None):
    """Seconds to wait after so many tries: random, so that many stations do not come at once."""
    import random
    if asked is not None:
        return min(LONGEST_WAIT, asked + random.uniform(0, max(asked, 2 ** min(tries, 12))))
    return random.uniform(0, min(LONGEST_WAIT, unit * 2 ** min(tries, 12)))


def read_answer(answer, url, keys):
    """The JSON object of an answer, or the error that it tells. `keys`: of texts it must hold."""
    status, found = answer.status, None
    kind = (answer.headers.get("Content-Type") or "").split(";")[0].strip().lower()
    if 300 <= status < 400:
        raise not_the_api(url, status, f"a redirect to {redirected_to(answer)}, not followed")
    if kind == "application/json" or kind.endswith("+json"):
        with contextlib.suppress(ValueError):
            found = load_json(answer.data)
    found = found if isinstance(found, dict) else {}
    if status < 300:
        if found and all(isinstance(found.get(key), str) and found[key] for key in keys.split()):
            return found
        said = answer.data[:60].decode("utf-8", "replace")
        raise not_the_api(url, status, f"{kind or 'no type'}, {said!r}" if said else "empty")
    said = found.get("message") or found.get("error_description") or found.get("error") or (
        status == 414 and "the address is too long: ask for fewer values at a time")
    if not said and status < 500:
        raise not_the_api(url, status, f"an error of type {kind or 'unknown'}")
    kind, hint = {
        401: (AccessDenied, "check the key, and that --url is the right server"),
        403: (AccessDenied, "a station key reaches the procedures linked to its station"),
        404: (NotFound, "")}.get(status) or (
            Refused, "correct the data; sending it again unchanged cannot work")
    if status in (408, 425, 429) or status >= 500:
        kind, hint = Unavailable, AGAIN
    code = found.get("code") if isinstance(found.get("code"), str) else None
    error = kind(f"the server answered {status}: {shown(said or 'no reason', 500)}", hint, status,
                 code, [issue_text(issue) for issue in dicts(found.get("issues"))])
    error.retry_after = retry_after(answer)
    raise error


def issue_text(issue):
    """path: message, of a problem that the server found."""
    path = issue.get("path") if isinstance(issue.get("path"), list) else []
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return (f"{where.lstrip('.')}: " if where else "") + str(issue.get("message"))


# ---- client --------------------------------------------------------------------------------------

class Client:
    """The operations on runs, with the names and arguments of the official SDK.

        client = Client()       # server, key and CA as on the command line
        client.create(outcome="PASS", procedure_id="proc_abc", serial_number="SN-1",
                      started_at=datetime, ended_at=datetime)  ->  {"id": "..."}

    Times are datetimes (local if naive) or text, JSON is plain dicts and lists, answers are the
    server's own dicts. Raises BadInput, AccessDenied, NotFound, Refused or Unavailable. `notify`
    is called with a line of text for each wait, `trace` for each request; `plan(method, url,
    body)`, if given, stands in for sending. Not for several threads at a time.
    """

    def __init__(self, url=None, api_key=None, ca_cert=None, timeout=30, retries=3,
                 allow_http=False, source="api_key", notify=None, trace=None, plan=None):
        self.notify, self.retries, self.plan = notify or (lambda text: None), retries, plan
        self.named = {"url": url, "api_key": api_key, "source": source, "allow_http": allow_http}
        self.transport = Transport(timeout, ca_cert or os.environ.get("TOFUPILOT_CA_CERT"), trace)
        self.found = None
        self.waits = None       # seconds waited, where all requests share one patience

    def close(self):
        """Closes the kept connections."""
        self.transport.close()

    @property
    def login(self):
        self.found = self.found or find_login(warn=self.notify, **self.named)
        return self.found

    def list(self, **filters):
        """One page: {"data": [run, ...], "meta": {"has_more", "next_cursor"}}."""
        return self.call("list", filters)

    def iterate(self, limit=None, page_size=100, **filters):
        """Runs, page after page over one connection; all of them, or `limit`."""
        for rows, _ in self.pages(limit, page_size, **filters):
            yield from rows

    def pages(self, limit=None, page_size=100, **filters):
        """(rows, meta) of each page. A run that slipped to the next page is not given twice.

        An error has `cursor`, where to go on.
        """
        filters, recent = check("list", filters), collections.deque(maxlen=10)
        cursor = filters.get("cursor")
        while True:
            filters["limit"] = min(page_size, limit or page_size)
            try:
                rows, meta = read_page(self.call("list", filters), cursor)
            except Error as error:
                error.cursor = cursor
                raise
            known = set().union(*recent)
            fresh = [row for row in rows if str(row.get("id", id(row))) not in known]
            recent.append({str(row.get("id")) for row in rows})
            yield fresh, meta
            cursor = filters["cursor"] = meta.get("next_cursor")
            limit = limit and limit - len(fresh)
            if not meta.get("has_more") or limit == 0:
                return

    def get(self, id):
        """The whole run."""
        return self.call("get", {"id": id})

    def create(self, **fields):
        """Creates a run once: {"id"}. The same content again gives the same run."""
        return self.send_create(with_ref(check("create", fields)))

    def update(self, id, **attachments):
        """Links uploads (attachments=[ID, ...]) to a run: {"id"}."""
        return self.call("update", dict(attachments, id=id))

    def update_metadata(self, id, metadata):
        """Sets keys, deletes those that are null, keeps the others: {"id"}."""
        return self.call("update_metadata", {"id": id, "metadata": metadata})

    def create_attachment(self, id, name):
        """An empty attachment on the run, and where to PUT its bytes: {"id", "upload_url"}."""
        return self.call("create_attachment", {"id": id, "name": name})

    def initialize(self, name):
        """An upload that no run has yet: {"id", "upload_url"}."""
        return self.call("initialize", {"name": name})

    def finalize(self, id):
        """Tells the server that the bytes are there: {"url"}."""
        return self.call("finalize", {"id": id})

    def whoami(self):
        """Whose key this is."""
        return self.call("whoami", {})

    def delete(self, ids):
        """Deletes runs, 100 a request: {"id": [those that are gone]}. NotFound if none was."""
        ids, gone, missing = check("delete", {"ids": ids})["ids"], [], None
        for start in range(0, len(ids), 100):
            part = ids[start:start + 100]
            try:
                answer = self.call("delete", {"ids": part})
                if not isinstance(answer.get("id"), list):
                    raise not_the_api(self.login.url, 200, "no list of IDs")
                gone += answer["id"]
            except Error as error:
                if error.status != 404:
                    if gone or isinstance(error, NotFound):
                        error.message += f"\n{len(gone)} of {counted(len(ids), 'run')} were deleted"
                    raise
                missing = error
                if error.unsure:        # the try without an answer deleted them
                    gone += part
        if missing and not gone:
            raise missing
        return {"id": gone}

    def call(self, operation, values):
        """The values checked, sent and answered."""
        wire = check(operation, values)
        try:
            return self.perform(lambda: self.send(operation, wire),
                                repeatable=operation != "create_attachment")
        except (NotFound, Refused) as error:
            id, said = wire.get("id"), error.message.partition(": ")[2]
            wrong = error.status == 400 and error.issues and re.match(
                r"ids?(?:\[(\d+)\])?: ", error.issues[0])
            if wrong and operation == "delete":     # the server looks at the form of an ID first
                id = wire["ids"][int(wrong.group(1) or 0)]
            if not id or not (wrong or isinstance(error, NotFound)):
                raise
            kind = "upload" if operation == "finalize" else "run"
            length = f"this ID has {len(id)} characters, IDs have 36: " if len(id) != 36 else ""
            raise NotFound(f"no {kind} {shown(id, 80)} ({error.status}): {said}",
                           length + "copy the whole ID; ls -q prints bare IDs", error.status,
                           error.code, error.issues) from None

    def send(self, operation, wire):
        """One exchange with the API: the JSON object of its answer."""
        from urllib.parse import quote, urlencode
        method, path, _, answer_keys = OPERATIONS[operation]
        rest, body, content, url = dict(wire), None, None, f"{self.login.url}/api{path}"
        if "{id}" in path:
            url = url.replace("{id}", quote(rest.pop("id"), safe=""))
        if method in ("POST", "PATCH") and operation != "finalize":     # that has no body at all
            body, content = rest, dump_json(rest).encode("ascii")
        elif rest:
            url += "?" + urlencode([(key, item if isinstance(item, str) else dump_json(item))
                                    for key, value in rest.items()
                                    for item in (value if isinstance(value, list) else [value])])
        if self.plan:
            return self.plan(method, url, body)
        if not self.login.key:
            raise no_key()
        headers = {"Authorization": "Bearer " + self.login.key, "Accept": "application/json",
                   "User-Agent": f"tofupilot_runs/{__version__} Python/{sys.version.split()[0]}"}
        if content:     # http.client tells its length
            headers["Content-Type"] = "application/json"
        answer = self.transport.exchange(method, url, headers, content)
        data = answer.data.replace(self.login.key.encode("ascii"), b"(the key)")
        answer = answer._replace(data=data)     # a server may say the key that it got
        try:
            return read_answer(answer, url, answer_keys)
        except Error as error:      # in the target of a redirect too
            error.message, *error.issues = [text.replace(self.login.key, "(the key)")
                                            for text in [error.message] + error.issues]
            if error.status == 401:
                error.message = (
                    f"the server refused the API key ending ...{self.login.key[-4:]} (401): "
                    f"{error.message.partition(': ')[2]}\n"
                    f"key from: {self.login.source}   server: {self.login.url}")
            raise

    def perform(self, once, repeatable=True, look=None):
        """once() until it succeeds, fails for good, or patience is over.

        `repeatable`: whether it may be sent once more after it may have arrived. `look` is called
        before that: what it finds is the result, and nothing is sent again.
        """
        started, tries, unsure, free = time.monotonic(), 0, False, False
        waits = [] if self.waits is None else self.waits
        while True:
            try:
                return once()
            except NotFound as error:
                error.unsure = unsure and tries > 0
                raise
            except Unavailable as error:
                # a kept connection was dead: that costs no try, the first time
                free = error.stale and repeatable and not free
                tries += not free
                unsure = unsure or error.sent
                wait = 0 if free else delay(tries, 1, error.retry_after)
                may = error.again and (repeatable or not error.sent)
                left = tries <= self.retries and sum(waits) + wait <= PATIENCE
                if not free and not (may and left):
                    if tries > 1:
                        first, end, rest = error.message.partition("\n")
                        first += f", {tries} tries in {time.monotonic() - started:.0f} s"
                        error.message = first + end + rest
                    error.sent = unsure
                    raise
                if wait:
                    self.notify(f"{error.message.splitlines()[0]}; again in {wait:.1f} s")
                time.sleep(wait)
                waits.append(wait)
            found = look and unsure and look()
            if found:
                return found

    def send_create(self, body, first_try=None, taken=set):
        """Creates the run of a checked body that has its client_run_ref: {"id"}.

        `first_try`: when (time.time()) an earlier attempt may have arrived, None for never; then
        it looks before it sends. `taken` gives the IDs of runs that are known to be others.
        """
        since = first_try or time.time()

        def look():
            try:
                return self.find_created(body, since, taken)
            except Error as error:
                error.message = ("the run may be stored or not, and looking for it failed; it was "
                                 "not sent again\n" + error.message)
                error.sent = True
                raise
        found = look() if first_try else None
        try:
            return found or self.perform(lambda: self.send("create", body), look=look)
        except Unavailable as error:
            if error.sent and error.status is None and "may be stored" not in error.message:
                error.message += "\nthe run may be stored or not"
                error.hint = "run the same command again: it cannot make a second run"
            raise

    def find_created(self, body, since, taken):
        """{"id"} of the run that an unanswered create of this body has made, or None.

        For servers that do not know client_run_ref. All that a row shows must agree, and the run
        must have been stored after the first try (the server's clock, 10 minutes of slack).
        """
        begin, _ = moment(body["started_at"])
        around = [(begin + datetime.timedelta(seconds=off)).isoformat() for off in (-1, 2)]
        for rows, _ in self.pages(
                serial_numbers=[body["serial_number"]], procedure_ids=[body["procedure_id"]],
                started_after=around[0], started_before=around[1], include_metadata=True):
            theirs, ours = self.transport.clocks or (time.time(), time.time())
            passed = ours - since
            earliest = theirs - passed - 600 if passed >= 0 else 0      # our clock was set back
            for row in rows:
                if (same_run(row, body) and row.get("id") not in taken()
                        and (epoch(row.get("created_at")) or theirs) >= earliest):
                    return {"id": row["id"]}
        return None


def no_key():
    return AccessDenied("no API key. Looked at TOFUPILOT_API_KEY, --api-key-file,\n"
                        f"{os.path.join(home(), 'credentials.json')} and station.json.",
                        "export TOFUPILOT_API_KEY=<key>; cron does not see your shell's\n"
                        "variables: use --api-key-file there")


def read_page(answer, cursor):
    """(rows, meta) of a page that is of the right form and leads on."""
    rows, meta = answer.get("data"), answer.get("meta")
    if not isinstance(rows, list) or len(dicts(rows)) < len(rows) or not isinstance(meta, dict):
        raise Unavailable("the server's page of runs is not {data, meta}", "is --url right?")
    following = meta.get("next_cursor")
    if meta.get("has_more") and not (isinstance(following, int) and following > (cursor or 0)):
        raise Unavailable("the server says that more runs exist, but its cursor does not advance: "
                          f"{shown(following, 40)}", "tell the server's administrator")
    return rows, meta


def with_ref(body):
    """The checked body of a create with its client_run_ref, made from the content if not given."""
    return body if body.get("client_run_ref") else dict(body, client_run_ref=run_ref(body))


def same_run(row, body):
    """Whether a row of ls can be the run that a create of this body made."""
    paths = {"serial_number": "unit.serial_number", "procedure_id": "procedure.id",
             "procedure_version": "procedure.version.tag", "part_number": "unit.part.number",
             "revision_number": "unit.part.revision.number", "batch_number": "unit.batch.number"}
    for field in [*paths, "outcome", "docstring", "execution_id", "slot_key", "slot_name"]:
        sent, path = body.get(field) or "", paths.get(field, field)
        given_by_server = not sent and path.startswith("unit.")
        if not given_by_server and str(sent).lower() != str(dig(row, path) or "").lower():
            return False
    for field in ("started_at", "ended_at"):     # the server keeps milliseconds
        if abs((epoch(row.get(field)) or 0) - epoch(body[field])) > 0.0011:
            return False
    operator = [str(dig(row, f"operated_by.{key}") or "").lower() for key in ("name", "email")]
    sent = body.get("operated_by", "").lower()
    return ((sent in operator if sent else not any(operator))
            and (row.get("metadata") or {}) == body.get("metadata", {}))


# ---- attaching -----------------------------------------------------------------------------------
#
# One way for create, create-attachment and the queue: POST /v2/attachments, PUT, finalize, and at
# last one PATCH that links all. A file has name, size, blocks(), sha256(), and how far it has come:
# upload_id and done; save() keeps that (the queue) or does nothing.

class LocalFile:
    """A regular file that is to be attached. BadInput if it cannot be read or is no such file."""

    def __init__(self, path, name=None):
        self.path, self.upload_id, self.done = path, None, False
        self.name = name or os.fsencode(os.path.basename(path)).decode("utf-8", "replace")
        with self.open() as file:
            now = os.fstat(file.fileno())
        self.size, self.changed = now.st_size, now.st_mtime_ns

    def open(self):
        try:
            number = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
                             | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise BadInput(f"cannot read {self.path}: {error.strerror}",
                           "name a file that this user can read") from None
        if not stat.S_ISREG(os.fstat(number).st_mode):      # a FIFO would block for ever
            os.close(number)
            raise BadInput(f"{self.path} is not a regular file", "name a file")
        return open(number, "rb")

    def blocks(self):
        """The content; BadInput if the file changes meanwhile."""
        with self.open() as file:
            left = self.size
            for block in iter(lambda: file.read(min(BLOCK, left)), b""):
                left -= len(block)
                yield block
            now = os.fstat(file.fileno())
            if left or (now.st_size, now.st_mtime_ns) != (self.size, self.changed):
                raise BadInput(f"{self.path} changed while it was read",
                               "run the command again when nothing writes to it")

    def sha256(self):
        return digest(self.blocks())

    def save(self):
        """Nothing: what has arrived is seen on the run."""


def content_type(name):
    import mimetypes
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def attach(client, run_id, files, progress=None):
    """Uploads the files that the run does not have and links them: those that were missing.

    It never drops what others linked. `progress` is called with (file, bytes sent).
    """
    def linked():
        return [row for row in dicts(client.get(run_id).get("attachments"))
                if isinstance(row.get("id"), str)]
    rows = linked()
    ids = [row["id"] for row in rows]
    for file in [file for file in files if not file.done]:
        there = find_attached(client, rows, file)
        if there:
            rows.remove(there)
            file.upload_id = there["id"]
        else:
            upload(client, file, progress)
        file.done = True
        file.save()
    missing = [file for file in files if file.upload_id not in ids]
    own = [file.upload_id for file in missing]
    if own:
        client.update(run_id, attachments=own)
    # whether PATCH appends or replaces is not documented
    if own and ids and not set(ids) <= {row["id"] for row in linked()}:
        client.update(run_id, attachments=ids + own)
    return missing


def find_attached(client, rows, file):
    """The row of attachments that is this file: name, size, and the bytes if they can be had."""
    import hashlib
    for row in rows:
        if row.get("name") == file.name and row.get("size") == file.size:
            tries = []

            def begin():
                tries.append(hashlib.sha256())
                return tries[-1].update
            if row.get("download_url"):
                fetch(client, row, begin)
            if not tries or tries[-1].hexdigest() == file.sha256():
                return row
    return None


def upload(client, file, progress):
    """Brings one file to the storage and finalizes it."""
    if file.upload_id:      # an earlier process came this far: had the bytes arrived?
        with contextlib.suppress(NotFound, Refused):
            return client.finalize(file.upload_id)
    for last in (False, True):
        made = client.initialize(file.name)
        file.upload_id = made["id"]
        file.save()
        try:
            put(client, made["upload_url"], file, progress)
            return client.finalize(file.upload_id)
        except Unavailable as error:        # 4xx: the URL has expired; ask for another, once
            if last or error.again or not 400 <= (error.status or 0) < 500:
                raise


def put(client, url, file, progress):
    """PUTs a file to its presigned URL; the key does not go there."""
    def content():
        sent = 0
        for block in file.blocks():
            yield block
            sent += len(block)
            if progress:
                progress(file, sent)
    if client.plan:
        return client.plan("PUT", url, None)
    at_storage(client, "PUT", url, file.size, content=content if file.size else b"", headers={
        "Content-Type": content_type(file.name), "Content-Length": str(file.size)})


def fetch(client, row, begin):
    """Gets an attachment. `begin` gives, for each try, the function that takes its blocks."""
    size = row.get("size")
    known = is_number(size) and 0 < size < 1 << 40
    at_storage(client, "GET", row["download_url"], size if known else 1 << 30,
               {"Accept": "*/*"}, begin=begin)


def at_storage(client, method, url, size, headers, content=None, begin=lambda: None):
    """Exchanges a file with the storage; Unavailable where it does not do what it should."""
    until = time.monotonic() + UPLOAD_WINDOW
    try:
        parts = check_url(url, True, "the server gave a URL for it that")
        must(parts.scheme == "https" or client.login.url.startswith("http:"),
             "the server gave a URL for it that is plain http")
    except ValueError as error:
        raise storage_error(str(error)) from None

    def once():
        if method == "PUT" and time.monotonic() > until:
            raise storage_error("its upload URL has expired", 403)
        answer = client.transport.exchange(method, url, headers, content, 60 + size / 16384,
                                           begin())
        if answer.status != 200:
            where = redirected_to(answer)
            told = f", a redirect to {where}" if where else ""
            error = storage_error(f"{parts.netloc} answered {answer.status}{told}",
                                  answer.status)
            error.retry_after = retry_after(answer)
            raise error
    client.perform(once)


def storage_error(why, status=None):
    error = Unavailable(f"the storage of the files: {why}",
                        "run the same command again later: only what is missing goes up", status)
    error.again = status in (408, 425, 429) or (status or 0) >= 500
    return error


def safe_name(name):
    r"""A file name that stays in its folder on every system.

    >>> safe_name("../a:b.txt"), safe_name("CON"), safe_name("..")
    ('.._a_b.txt', '_CON', 'attachment')
    """
    code = sys.getfilesystemencoding()      # what it cannot write becomes ?, as encode() has it
    name = str(name).encode(code, "replace").decode(code)
    name = "".join("_" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name)
    name = name.strip(" ").rstrip(". ")
    if len(name) > 120:
        stem, ending = os.path.splitext(name)
        name = stem[:100] + ending[:16]
    reserved = re.match(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name)
    return ("_" if reserved else "") + name if name else "attachment"


def download(client, row, folder):
    """Saves an attachment under a safe name, never over a file that exists. Returns the path."""
    def write(file):
        def begin():
            file.seek(0)
            file.truncate()
            return file.write
        fetch(client, row, begin)
    return save_new(folder, row.get("name"), write)


@contextlib.contextmanager
def part_of(path):
    """The name of a file beside `path`, which is gone at the end."""
    part = f"{path}.{os.getpid()}.part"
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def save_new(folder, name, write):
    """Makes a file with write(file); a name that is taken gets -2, -3. Returns the path."""
    os.makedirs(folder, exist_ok=True)
    path = local_path(os.path.join(folder, safe_name(name)))
    stem, ending = os.path.splitext(path)
    with part_of(path) as part:
        with open(part, "xb") as file:
            write(file)
        for number in range(2, sys.maxsize):
            with contextlib.suppress(FileExistsError):
                open(path, "xb").close()
                break
            path = f"{stem}-{number}{ending}"
        replace(part, path)
    return path


def replace(source, target):
    """os.replace; on Windows it waits for virus scanners, that look at the target, to leave."""
    for number in range(10):
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in (5, 32, 33) or number == 9:
                raise
            time.sleep(min(0.01 * 2 ** number, 0.64))


# ---- queue ---------------------------------------------------------------------------------------
#
# One SQLite file holds the runs that wait for the network, their files, and how far each has come.
# The states of an entry and all moves between them:
#
#     storing -> waiting   store: its files are in; before that it cannot be sent
#     waiting -> sent      send: the run and all its files are on the server; a receipt for 30 days
#     waiting -> parked    send: the server refused it for good
#     parked  -> waiting   retry
#     waiting -> moving    move, first commit: another file may have it, it is not sendable here
#     moving  -> moved     move, last commit: the other file has it; a receipt for 30 days
#     sent    -> waiting   store: the same create again, with more files
#     moved   -> waiting   move: it came back from another file
#
# Exactly once: tried_at and origin are committed before the first byte goes out. Where they stand
# without a run_id, the run may be on the server: the sender looks before it sends again.
#
# What the columns of an entry do not say themselves: ref is the client_run_ref, content the ref
# that the body alone would have; units the serial numbers in it, in lower case; origin the server
# that it was begun at; target where a move goes, hop the token of that move, came the hop that
# brought it here; ended_at when it became a receipt.

APPLICATION_ID, SCHEMA_VERSION = 0x54465251, 1      # "TFRQ" in the file's header
RECEIPT_DAYS = 30           # how long a receipt answers the same create
SUB_UNIT_HOURS = 72         # how long a run may wait for the runs of its sub-units
BATCH = 50                  # runs marked, and receipts written, in one commit
SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE identity (id TEXT);
INSERT INTO identity VALUES (lower(hex(randomblob(16))));
CREATE TABLE entry (id INTEGER PRIMARY KEY AUTOINCREMENT, ref TEXT, state TEXT, body TEXT,
    units TEXT, outcome TEXT, serial_number TEXT, procedure_id TEXT, stored_at REAL,
    tries INTEGER DEFAULT 0, tried_at REAL, failed_at REAL, next_try_at REAL DEFAULT 0,
    error TEXT, exit_code INTEGER, content TEXT, origin TEXT, run_id TEXT, target TEXT,
    hop TEXT, came TEXT, ended_at REAL);
CREATE INDEX entry_by_ref ON entry (ref);
CREATE INDEX entry_by_state ON entry (state, id);
CREATE TABLE file (id INTEGER PRIMARY KEY AUTOINCREMENT, entry INTEGER, name TEXT, size INTEGER,
    sha256 TEXT, upload_id TEXT, done INTEGER DEFAULT 0);
CREATE INDEX file_by_entry ON file (entry);
CREATE TABLE chunk (file INTEGER, part INTEGER, data BLOB, PRIMARY KEY (file, part))"""


class QueueUnusable(Unavailable):
    """The queue file cannot be read or written. It was left as it is."""
    sent = False


class Queue:
    """The queue file at a path; makes it if it is missing, unless `must_exist` (NotFound)."""

    def __init__(self, path, must_exist=False):
        self.path, self.connection = os.path.abspath(path), None
        if must_exist and not os.path.exists(self.path):
            raise NotFound(f"there is no queue file {self.path}",
                           "check the path and the user: the default one is each user's own")
        try:
            import sqlite3
            self.sqlite3 = sqlite3
            new = self.look_at_header()
            # 3.6 takes the path as UTF-8, whatever the locale says
            self.name = self.path if sys.version_info >= (3, 7) else os.fsencode(self.path).decode()
            self.connection = sqlite3.connect(self.name, timeout=30, isolation_level=None)
            self.connection.row_factory = sqlite3.Row
            if new:     # before anything else: later it is ignored without a word
                self.sql("PRAGMA auto_vacuum = INCREMENTAL")
            # before 3.12 EXTRA would mean NORMAL
            self.sql("PRAGMA synchronous = "
                     + ("EXTRA" if sqlite3.sqlite_version_info >= (3, 12) else "FULL"))
            self.sql("PRAGMA secure_delete = OFF")
            if not self.sql("SELECT name FROM sqlite_master"):
                with self.transaction():
                    if not self.sql("SELECT name FROM sqlite_master"):  # nobody else was first
                        for statement in SCHEMA.split(";"):
                            self.sql(statement)
            self.identity = self.sql("SELECT id FROM identity")[0]["id"]
        except ImportError:
            raise self.unusable("this Python has no sqlite3") from None
        except OSError as error:
            raise self.unusable(error.strerror) from None
        except BaseException as error:
            if self.connection:
                self.connection.close()
            if isinstance(error, sqlite3.Error):
                raise self.unusable(error) from None
            raise

    def look_at_header(self):
        """Whether the file is new; raises where it is no queue, before SQLite touches it."""
        if os.path.dirname(self.path) == home():
            with contextlib.suppress(FileExistsError):
                os.makedirs(home(), 0o700)
        number = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        with open(number, "rb") as file:
            head = file.read(100)
        ours = head[:16] == b"SQLite format 3\0"
        if not head or head[:16] == bytes(16) and os.path.exists(self.path + "-journal"):
            return True
        if ours and not any(head[40:44] + head[60:64] + head[68:72]):
            return True     # auto_vacuum was set, no table was ever made
        if not ours or head[68:72] != APPLICATION_ID.to_bytes(4, "big"):
            raise self.unusable("it is not a queue file")
        if int.from_bytes(head[60:64], "big") > SCHEMA_VERSION:
            raise self.unusable(f"a newer version of {PROG} made it",
                                "use that version, or another queue file")
        return False

    def unusable(self, why, hint="check the path, its rights and the room on the disk"):
        return QueueUnusable(f"cannot use the queue {self.path}: {why}", hint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def sql(self, statement, *values):
        """The rows of one statement."""
        try:
            return self.connection.execute(statement, values).fetchall()
        except (self.sqlite3.Error, UnicodeError) as error:
            raise self.unusable(error) from None

    def insert(self, table, **values):
        """The number of a new row."""
        self.sql(f"INSERT INTO {table} ({', '.join(values)}) VALUES ("
                 f"{', '.join('?' * len(values))})", *values.values())
        return self.sql("SELECT last_insert_rowid()")[0][0]

    def change(self, number, **values):
        names = ", ".join(f"{name} = ?" for name in values)
        self.sql(f"UPDATE entry SET {names} WHERE id = ?", *values.values(), number)

    @contextlib.contextmanager
    def transaction(self):
        self.sql("BEGIN IMMEDIATE")
        try:
            yield
            self.sql("COMMIT")
        except BaseException:
            with contextlib.suppress(QueueUnusable):
                self.sql("ROLLBACK")
            raise

    def entries(self, where, *values):
        """Entries (dicts) without what is large, oldest first; `files` is how many they have."""
        return [dict(row) for row in self.sql(
            "SELECT id, ref, state, units, outcome, serial_number, procedure_id, stored_at, tries, "
            "tried_at, failed_at, next_try_at, error, exit_code, content, origin, run_id, target, "
            "hop, came, (SELECT count(*) FROM file WHERE entry = entry.id) AS files "
            f"FROM entry WHERE state != 'storing' AND {where} ORDER BY id", *values)]

    def by_ref(self, ref):
        """The entry of a ref, or None: there is one at most."""
        return next(iter(self.entries("ref = ?", ref)), None)

    def find(self, ref):
        """The entry whose ref begins so; NotFound or BadInput where none or several do."""
        found = self.entries("ref = ?", ref) or self.entries(
            "substr(ref, 1, ?) = ?", len(ref) or 1, ref)
        found = [entry for entry in found if entry["state"] not in ("sent", "moved")] or found
        if len(found) > 1:
            raise BadInput(f"{len(found)} entries begin with {ref[:80]}", "give more of it")
        if not found:
            raise NotFound(f"no entry {ref[:80]} in {self.path}", "queue ls names them")
        return found[0]

    def body(self, number):
        """The request of an entry as JSON; None in a receipt, or where queue rm took it."""
        rows = self.sql("SELECT body FROM entry WHERE id = ?", number)
        return rows[0]["body"] if rows else None

    def files(self, number):
        return [QueuedFile(self, row) for row in
                self.sql("SELECT * FROM file WHERE entry = ? ORDER BY id", number)]

    def store(self, body, files, origin=None):
        """Commits a create and its files: the entry that holds it. The same create is one entry.

        A receipt from another server than `origin` (None: not known) does not answer.
        """
        units = {unit.lower() for unit in [body["serial_number"]] + body.get("sub_units", [])}
        return self.enter({
            "ref": body["client_run_ref"], "body": dump_json(body), "content": run_ref(body),
            "units": dump_json(sorted(units)), "outcome": body["outcome"],
            "serial_number": body["serial_number"], "procedure_id": body["procedure_id"],
            "stored_at": time.time()}, files, origin)

    def enter(self, values, files, origin=None):
        """Enters an entry with its files, or adds to the one that is there what it lacks."""
        ref, came = values["ref"], values.get("came")

        def over(old):      # it came back; another server's receipt
            return (old["state"] == "moved" and came not in (None, old["came"])
                    or old["state"] == "sent" and origin not in (None, old["origin"]))
        old = self.by_ref(ref)
        if old and not over(old):
            files = self.lacks(old, files)
        with self.transaction():
            self.drop("state = 'storing' AND coalesce(ended_at, stored_at) < ?",
                      time.time() - 86400)      # by its own clock: a move keeps stored_at
            mine = self.insert("entry", **dict(values, state="storing", ended_at=time.time()))
            for file in files:
                self.copy_in(mine, file)
            old = self.by_ref(ref)        # it may have come meanwhile
            if old and old["content"] != values["content"]:
                raise BadInput(f"client_run_ref {ref[:80]} is another run's in {self.path}",
                               "give each run a reference of its own, or none")
            if old and over(old):
                self.drop("id = ?", old["id"])
            elif old:
                there = (old["target"] or "").partition(" ")[2]
                if old["state"] == "moving" and came not in (None, old["came"]):
                    raise self.unusable(
                        "a move out of it is not finished",
                        f"repeat that first: queue move {there} --queue {self.path}")
                new = self.lacks(old, self.files(mine))
                if new and old["state"] in ("moving", "moved"):
                    raise self.unusable(f"this run has gone to {there}",
                                        "add the files there: create with --queue and that file")
                for file in new:
                    self.sql("UPDATE file SET entry = ? WHERE id = ?", old["id"], file.number)
                self.drop("id = ?", mine)
                if new and old["state"] == "sent":
                    self.change(old["id"], state="waiting", next_try_at=0, body=values["body"])
                if values.get("tried_at") and not old["tried_at"]:      # it may be on the server
                    self.change(old["id"], **{name: values[name] for name in (
                        "tried_at", "origin", "run_id")})
            self.sql("UPDATE entry SET state = 'waiting', ended_at = NULL WHERE id = ?", mine)
            found = self.by_ref(ref)    # here: after the COMMIT nothing may fail
            if not found:
                raise self.unusable("the entry was removed while its files were copied")
            return found

    def lacks(self, entry, files):
        """Those of the files that the entry does not hold: name and content tell."""
        have = {(file.name, file.sha256()) for file in self.files(entry["id"])}
        return [file for file in files if not have or (file.name, file.sha256()) not in have]

    def copy_in(self, entry, file):
        """Copies a file in, in transactions of 16 MiB: others can write between them."""
        import hashlib
        found = hashlib.sha256()
        number = self.insert("file", entry=entry, name=file.name, size=file.size,
                             upload_id=file.upload_id, done=int(file.done))
        for part, block in enumerate(file.blocks()):
            found.update(block)
            self.sql("INSERT INTO chunk VALUES (?, ?, ?)", number, part, block)
            if part % 256 == 255:
                self.sql("COMMIT")
                self.sql("BEGIN IMMEDIATE")
        self.sql("UPDATE file SET sha256 = ? WHERE id = ?",
                 file.sha256() if file.done else found.hexdigest(), number)

    def drop(self, where, *values):
        """Deletes entries with all that they hold."""
        chosen = f"(SELECT id FROM entry WHERE {where})"
        self.sql(f"DELETE FROM chunk WHERE file IN (SELECT id FROM file WHERE entry IN {chosen})",
                 *values)
        self.sql(f"DELETE FROM file WHERE entry IN {chosen}", *values)
        self.sql(f"DELETE FROM entry WHERE {where}", *values)

    def end(self, entry, state):
        """Makes an entry a receipt: what is large goes."""
        if entry["files"]:
            self.sql("DELETE FROM chunk WHERE file IN (SELECT id FROM file WHERE entry = ?)",
                     entry["id"])
        self.change(entry["id"], state=state, body=None, error=None, ended_at=time.time(),
                    run_id=entry["run_id"])

    def tidy(self):
        """Old receipts go, and the room that they took goes back to the disk in small steps."""
        with self.transaction():
            self.drop("state IN ('sent', 'moved') AND ended_at < ?",
                      time.time() - RECEIPT_DAYS * 86400)
        for _ in range(0, self.sql("PRAGMA freelist_count")[0][0], 1000):
            try:        # execute() would free one page: only executescript() goes on to the end
                self.connection.executescript("PRAGMA incremental_vacuum(1000)")
            except self.sqlite3.Error as error:
                raise self.unusable(error) from None

    @contextlib.contextmanager
    def sender(self):
        """Whether this process is the one sender of the file: a lock that ends with the process."""
        with contextlib.ExitStack() as stack:
            try:
                lock = self.sqlite3.connect(self.name + ".lock", timeout=0, isolation_level=None)
                stack.callback(lock.close)
                lock.execute("BEGIN EXCLUSIVE")
            except self.sqlite3.Error as error:
                if "locked" not in str(error):
                    raise self.unusable(f"its .lock file: {error}") from None
            yield lock.in_transaction

    def meta(self):
        counts = dict(map(tuple, self.sql("SELECT state, count(*) FROM entry GROUP BY state")))
        states = ("waiting", "parked", "sent", "moving")
        return dict({state: counts.get(state, 0) for state in states},
                    file=self.path, bytes=os.path.getsize(self.path))


class QueuedFile:
    """A file in the queue, used like a LocalFile; `save` commits how far it has come."""

    def __init__(self, queue, row):
        self.queue, self.number, self.name, self.size = queue, row["id"], row["name"], row["size"]
        self.digest, self.upload_id, self.done = row["sha256"], row["upload_id"], bool(row["done"])

    def blocks(self):
        for part in range((self.size + BLOCK - 1) // BLOCK):    # one key, no sorting
            found = self.queue.sql("SELECT data FROM chunk WHERE file = ? AND part = ?",
                                   self.number, part)
            if not found and self.done:     # it went up before its entry was a receipt
                return
            if not found:
                raise self.queue.unusable(f"{self.name} was removed meanwhile")
            yield found[0]["data"]

    def sha256(self):
        return self.digest

    def save(self):
        self.queue.sql("UPDATE file SET upload_id = ?, done = ? WHERE id = ?", self.upload_id,
                       int(self.done), self.number)


def is_due(entry, now):
    """Whether its wait is over; a clock that was set back never makes it longer."""
    return now >= entry["next_try_at"] or now < (entry["failed_at"] or 0) - 60


def after_failure(error, tries, waited_for_unit):
    """(state, seconds to wait, what it does to the pass) of an entry that failed.

    The pass: "end", "count" (three in a row end it) or "go on". `waited_for_unit`: seconds since a
    run with sub-units was stored, None for one without.
    """
    status = error.status
    if isinstance(error, AccessDenied):
        return ("waiting", 3600, "count") if status == 403 else ("waiting", 0, "end")
    if isinstance(error, Unavailable):
        if status is None or isinstance(error, NotTheAPI):      # no answer, or a portal's
            return "waiting", 0, "end"
        return ("waiting", delay(tries, 15, error.retry_after),
                "end" if status in (429, 503) else "count" if status >= 500 else "go on")
    told = " ".join([error.message] + error.issues)
    if (waited_for_unit is not None and status in (400, 404) and re.search("(?i)sub.?unit", told)
            and waited_for_unit < SUB_UNIT_HOURS * 3600):
        return "waiting", min(900 * 2 ** min(tries, 9), 21600), "go on"
    return "parked", 0, "go on"


def elsewhere(entry, url):
    """Why an entry waits for another server than this one, or None."""
    return None if entry["origin"] in (None, url) else f"begun at {entry['origin']}, waits for it"


class Pass:
    """One pass over a queue: what is due is sent, oldest first."""

    def __init__(self, queue, client, tell=lambda text: None, force=()):
        """`force`: the refs of entries that do not wait for their time."""
        self.queue, self.client, self.tell, self.force = queue, client, tell, force
        self.sent, self.unsent, self.marked = [], [], set()
        self.fresh, self.flushed = [], time.monotonic()     # what went and has no receipt yet
        self.streak, self.over = 0, False

    def run(self):
        """False where another process is sending this queue."""
        with self.queue.sender() as alone:
            if alone:
                try:
                    self.send_all()
                finally:
                    self.flush()
                    self.mark(self.marked, None, None)      # those surely did not go out
                self.queue.tidy()
            return alone

    def send_all(self):
        """Sends what is due; an entry that shares a unit with an older one waits for it."""
        blocked, now, here = set(), time.time(), self.client.login.url
        entries = self.queue.entries("state = 'waiting'")
        for entry in entries:
            entry["units"] = set(json.loads(entry["units"]))
            why = elsewhere(entry, here)
            entry["ready"] = not why and (entry["ref"] in self.force or is_due(entry, now))
            if why:
                entry.update(error=why, exit_code=6)
                self.queue.change(entry["id"], error=why)
                self.unsent.append(entry)
                self.tell(f"waiting {entry['serial_number']}: {why}")
        for number, entry in enumerate(entries):
            if entry["ready"] and not entry["units"] & blocked:
                if entry["tried_at"] is None and entry["id"] not in self.marked:
                    soon = {other["id"] for other in entries[number:number + BATCH]
                            if other["ready"] and other["tried_at"] is None}
                    self.mark(soon, time.time(), here)
                    self.marked |= soon
                self.send(entry)
            if entry["state"] == "waiting":     # where it waits for its sub-units (5), they pass
                serial = {entry["serial_number"].lower()}
                blocked |= serial if entry["exit_code"] == 5 else entry["units"]
            if self.over:
                return

    def mark(self, numbers, now, here):
        """Commits that these may go out from now on, or that they did not."""
        self.queue.sql("UPDATE entry SET tried_at = ?, origin = ? WHERE id IN "
                       f"({', '.join(map(str, numbers))})", now, here)

    def send(self, entry):
        """Sends one entry and its files; its new state stands in it."""
        queue, number = self.queue, entry["id"]
        self.marked.discard(number)
        body = queue.body(number)
        if body is None:        # queue rm was quicker
            entry["state"] = "removed"
            return
        body = json.loads(body)
        if entry["tried_at"] or any(entry["units"] & other["units"] for other in self.fresh):
            self.flush()        # a look must know which runs are others

        def taken():
            return {row["run_id"] for row in queue.sql(
                "SELECT run_id FROM entry WHERE run_id IS NOT NULL AND "
                "lower(serial_number) = lower(?)", entry["serial_number"])}
        try:
            if not entry["run_id"]:
                entry["run_id"] = self.client.send_create(body, entry["tried_at"], taken)["id"]
            if entry["files"]:
                self.flush()
                queue.change(number, run_id=entry["run_id"])
                attach(self.client, entry["run_id"], queue.files(number))
        except QueueUnusable:
            raise
        except Error as error:
            self.failed(entry, body, error)
            return
        self.fresh.append(entry)
        if len(self.fresh) >= BATCH or time.monotonic() - self.flushed > 1:
            self.flush()
        self.streak = 0
        self.sent.append(entry)
        self.tell(f"sent {entry['serial_number']} {entry['outcome']} as run {entry['run_id']}")
        entry["state"] = "sent"

    def flush(self):
        """Commits the receipts of what went. A kill before it costs a look at each, no more."""
        if not self.fresh:
            return
        with self.queue.transaction():
            unfinished = {row["entry"] for row in
                          self.queue.sql("SELECT entry FROM file WHERE done = 0")}
            for entry in self.fresh:
                if entry["id"] in unfinished:       # it got more files meanwhile
                    self.queue.change(entry["id"], run_id=entry["run_id"])
                else:
                    self.queue.end(entry, "sent")
        self.fresh, self.flushed = [], time.monotonic()

    def failed(self, entry, body, error):
        self.flush()
        now, url = time.time(), self.client.login.url
        state, wait, effect = after_failure(
            error, entry["tries"], now - entry["stored_at"] if body.get("sub_units") else None)
        unsure = entry["run_id"] or entry["tried_at"] or error.sent
        told = "; ".join(error.issues[:20] + [" ".join(error.message.split())]).encode(
            "utf-8", "backslashreplace").decode()
        entry.update(state=state, error=told,
                     exit_code=5 if isinstance(error, NotFound) else error.exit_code)
        self.queue.change(
            entry["id"], state=state, tries=entry["tries"] + 1, failed_at=now,
            next_try_at=now + wait, exit_code=entry["exit_code"], error=told[:4000],
            tried_at=(entry["tried_at"] or now) if unsure else None, origin=url if unsure else None)
        self.unsent.append(entry)
        self.streak = self.streak + 1 if effect == "count" else 0
        self.over = effect == "end" or self.streak >= 3
        self.tell(f"{state} {entry['serial_number']}: {told[:300]}"
                  + (f"; next try in {wait:.0f} s" if wait else ""))


def move(queue, path):
    """Hands all waiting entries to another queue file: how many. Repeatable at every point.

    Three commits for each: mark here, insert there, end here. The target is known by its identity
    (a stick has another path on another machine), a hand-over by the token that goes with it.
    """
    with queue.sender() as alone:
        if not alone:
            raise Unavailable("another process is sending this queue", "try again when it is done")
        with Queue(path) as target:
            if target.identity == queue.identity:
                raise BadInput("source and target are the same queue")
            for entry in queue.entries("state = 'moving'"):
                identity, _, other = entry["target"].partition(" ")
                if identity != target.identity:
                    raise BadInput(
                        f"a move to another file is not finished: {other}", "move to that file "
                        "first; if it is lost: queue get REF --json, create it again, queue rm REF")
            with queue.transaction():
                queue.sql("UPDATE entry SET state = 'moving', target = ?, hop = ? || id WHERE "
                          "state = 'waiting'", f"{target.identity} {target.path}",
                          os.urandom(16).hex())
            moving = queue.entries("state = 'moving'")
            for number, entry in enumerate(moving):
                values = dict(entry, id=None, body=queue.body(entry["id"]), target=None, hop=None,
                              came=entry["hop"])
                del values["files"]
                if values["body"] is None:      # queue rm was quicker
                    continue
                try:
                    target.enter(values, queue.files(entry["id"]))
                except Error as error:      # full, or gone: what surely is not there stays here
                    for rest in moving[number:]:
                        there = target.by_ref(rest["ref"])
                        if (not there or there["content"] != rest["content"]
                                or there["state"] == "moved" and there["came"] != rest["hop"]):
                            queue.change(rest["id"], state="waiting", target=None, hop=None)
                    error.message += f"\n{number} of {counted(len(moving), 'run')} moved"
                    raise
                with queue.transaction():
                    queue.end(entry, "moved")
            queue.tidy()
            return len(moving), target.path


# ---- output --------------------------------------------------------------------------------------

class Result:
    """What a command gives to main: a JSON document, lines for people (or a function of the Screen
    that gives them), rows, exit status. `pages` (ls) are (rows, meta) as they arrive.

    `ids`: what -q prints, if that is not the id of each row.
    """
    error = None        # what is told after all else is written

    def __init__(self, document=None, lines=None, rows=None, ids=None, pages=None, columns=None,
                 status=0):
        rows = [document] if rows is None else rows
        self.document, self.lines, self.ids, self.status = document, lines, ids, status
        self.pages = pages or [(rows, None)]
        self.columns = columns or [(key, key) for key in (rows or [{}])[0]]


RUN_COLUMNS = (("ID", "id"), ("OUTCOME", "outcome"), ("SERIAL", "unit.serial_number"),
               ("PROCEDURE", "procedure.name"), ("STARTED", "started_at"))
CSV_COLUMNS = """id outcome unit.serial_number unit.part.number unit.part.revision.number
    unit.batch.number procedure.id procedure.name procedure.version.tag started_at ended_at
    duration created_by_station.name operated_by.name""".split()
COLOURS = dict(PASS=32, FAIL=31, ERROR=35, TIMEOUT=35, ABORTED=33, SKIP=33, UNSET=33)


def isatty(stream):
    """Whether there is a terminal: services have no streams, or closed ones."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


class Screen:
    """Writes a Result as a table or text, JSON, JSON lines or CSV, to a terminal, pipe or file."""

    def __init__(self, stream, format="table", columns=None, quiet=False):
        self.stream, self.format, self.quiet = stream, format, quiet
        self.columns = [(path.strip(),) * 2 for path in columns.split(",")] if columns else []
        self.tty = format == "table" and isatty(stream)
        self.width = terminal_width() if self.tty else 0
        self.colour = (self.tty and not os.environ.get("NO_COLOR")
                       and os.environ.get("TERM") != "dumb" and console_takes_colour())

    def write(self, result):
        put, lines = self.stream.write, result.lines
        if self.quiet:
            for rows, _ in result.pages:
                ids = [row.get("id") for row in rows] if result.ids is None else result.ids
                put("".join(f"{shown(id)}\n" for id in ids))
                self.stream.flush()
        elif self.format == "json" and result.document is None:
            self.write_pages(result.pages)
        elif self.format == "json":
            put(dump_json(result.document, 2) + "\n")
        elif self.format == "jsonl":
            for rows, _ in result.pages:
                put("".join(dump_json({path: dig(row, path) for path, _ in self.columns} or row)
                            + "\n" for row in rows))
                self.stream.flush()
        elif self.format == "table" and lines is not None and not self.columns:
            lines = lines(self) if callable(lines) else map(shown, lines)
            put("".join(f"{line}\n" for line in lines))
        else:
            write = self.write_csv if self.format == "csv" else self.write_rows
            write(result.pages, self.columns or result.columns)
        self.stream.flush()

    def write_pages(self, pages):
        """{"data": [...], "meta": {...}} as it arrives; closed properly when a page fails."""
        meta, comma = {"has_more": False, "next_cursor": None}, ""
        self.stream.write('{"data": [')
        try:
            for rows, meta in pages:
                if rows:
                    self.stream.write(comma + "\n" + ",\n".join(map(dump_json, rows)))
                    comma = ","
                self.stream.flush()
        except Error as error:
            meta = {"has_more": True, "next_cursor": error.cursor}
            raise
        finally:
            self.stream.write(f'\n], "meta": {dump_json(meta)}}}\n')

    def write_rows(self, pages, columns):
        """A table, with tabs where it is no terminal's."""
        kept, paths = None, [path for _, path in columns]
        table = [[title for title, _ in columns]]
        for rows, _ in pages:
            table += [[cell(dig(row, path), path, self.tty) for path in paths] for row in rows]
            if self.tty:
                kept = kept or fit(table, columns, self.width, bool(self.columns))
            for line in table:
                if self.tty:
                    line = "  ".join(self.paint(cut(line[i], width), paths[i])
                                     for i, width in kept).rstrip()
                else:
                    line = "\t".join(line)
                self.stream.write(line + "\n")
            self.stream.flush()
            table = []

    def write_csv(self, pages, columns):
        import csv
        paths = CSV_COLUMNS if columns is RUN_COLUMNS else [path for _, path in columns]
        writer = csv.writer(self.stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(map(csv_text, paths))
        for rows, _ in pages:
            writer.writerows([csv_text(dig(row, path)) for path in paths] for row in rows)
            self.stream.flush()

    def paint(self, text, path="outcome"):
        """An outcome in its colour, anything else as it is."""
        code = self.colour and path == "outcome" and COLOURS.get(text.strip())
        return f"\x1b[{code}m{text}\x1b[0m" if code else text


def terminal_width():
    """As in shutil, whose import takes longer than all of this."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return (int(os.environ.get("COLUMNS") or 0)
                or os.get_terminal_size(sys.__stdout__.fileno()).columns or 80)
    return 80


def console_takes_colour():
    if os.name != "nt":
        return True
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes
        kernel = ctypes.windll.kernel32
        return bool(kernel.SetConsoleMode(kernel.GetStdHandle(-11), 7))
    return False


def cells(text):
    """Columns of a terminal that a text takes."""
    if max(text, default="") < "\u0300":
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF"
               else 1 for c in text)


def cut(text, width):
    """Text in exactly so many columns, cut with ... where it is longer."""
    if cells(text) > width:
        while text and cells(text) > width - 3:
            text = text[:-1]
        text = (text + "...")[:width]
    return text + " " * (width - cells(text))


def fit(lines, columns, width, keep_all):
    """[(number of a column, its width)] of a table on a terminal; IDs, outcomes, times stay whole.

    The others share what is left, 8 at least; then the procedure goes, the time, the serial
    number; a queue's table loses its last columns, what was asked for (`keep_all`) none.
    """
    need, keep = [max(map(cells, texts)) for texts in zip(*lines)], list(range(len(columns)))
    drop = keep[:0:-1]          # from the last one on, never the first
    if columns is RUN_COLUMNS:
        drop = [3, 4, 2]        # PROCEDURE, STARTED, SERIAL
    if keep_all:
        drop = []
    hard = [i for i in keep if columns[i][1].endswith(("outcome", "id", "_at", "_ref"))]
    while True:
        free = width - 1 - 2 * (len(keep) - 1) - sum(need[i] for i in keep if i in hard)
        shares = sorted((i for i in keep if i not in hard), key=need.__getitem__)
        if sum(min(need[i], 8) for i in shares) <= free or not drop:
            break
        keep.remove(drop.pop(0))
    for number, i in enumerate(shares):       # the short ones first
        need[i] = min(need[i], max(8, free // (len(shares) - number)))
        free -= need[i]
    if len(keep) == 2 and columns is RUN_COLUMNS:
        keep.reverse()          # OUTCOME, then the ID, which is the longer one
    return [(i, need[i]) for i in keep]


def cell(value, path, tty):
    """A value in a table: as people write it on a terminal, whole and in UTC in a pipe."""
    if value is None:
        return "-" if tty else ""
    if path.endswith("_at") and epoch(value) is not None:
        return ago(time.time() - epoch(value)) if tty else instant(value)
    if tty and path == "client_run_ref":
        return shown(value)[:12]
    return duration_text(value) if path.endswith("duration") and tty else shown(value)


def ago(seconds):
    """2m ago, 3h ago; in 5m for what is to come."""
    unit = next((unit for unit in "dhm" if abs(seconds) >= 2 * _SECONDS[unit]), "s")
    text = f"{int(abs(seconds) // _SECONDS[unit])}{unit}"
    return f"{text} ago" if seconds >= 0 else f"in {text}"


def csv_text(value):
    """A cell of a CSV file that no spreadsheet takes for a formula.

    >>> csv_text("-12.5"), csv_text("=1+1"), csv_text({"a": 1})
    ('-12.5', "'=1+1", '{"a": 1}')
    """
    if not isinstance(value, str):
        return "" if value is None else dump_json(value)
    text = shown(value, keep="\t\n")
    if re.match("[\t\r\n]|\\s*[-=+@\uff1d\uff0b\uff0d\uff20]", value):
        try:
            float(value)
        except ValueError:
            text = "'" + text
    return text


def report(run, screen, link, failed_only, logs):
    """The lines of a run for people: verdict, unit, times, phases, measurements, files, logs."""
    def text(path, before=""):
        value = dig(run, path)
        return "" if value in (None, "") else before + shown(value)

    def when(name):
        at = epoch(run.get(name))
        if at is None or not screen.tty:
            return text(name) if at is None else instant(run[name])
        local = datetime.datetime.fromtimestamp(at, _UTC).astimezone().isoformat(" ", "seconds")
        return f"{local[:19]} {local[19:]} ({ago(time.time() - at)})"
    yield "  ".join(filter(None, [
        screen.paint(text("outcome")), text("unit.serial_number"),
        text("procedure.name") + text("procedure.version.tag", " "),
        duration_text(run.get("duration"))]))
    yield ""
    metadata = run.get("metadata") if isinstance(run.get("metadata"), dict) else {}
    for title, value in (
            ("Run", text("id")),
            ("Unit", text("unit.serial_number") + text("unit.part.number", "   part ")
             + text("unit.part.revision.number", "   rev ")
             + text("unit.batch.number", "   batch ") + text("unit.sample", "   sample ")),
            ("Station", text("created_by_station.name")),
            ("User", text("created_by_user.name") or text("created_by_user.email")),
            ("Operator", text("operated_by.name") or text("operated_by.email")),
            ("Slot", text("slot_name") or text("slot_key")), ("Started", when("started_at")),
            ("Ended", when("ended_at")), ("Uploaded", when("created_at")),
            ("Note", text("docstring")), ("Metadata", "  ".join(
                f"{shown(key)}={shown(item)}" for key, item in metadata.items())), ("Link", link)):
        if value:
            yield f"{title:<10} {value}"
    yield from phase_lines(dicts(run.get("phases")), screen, failed_only)
    lines = [f"{shown(row.get('name'))}  {size_text(row.get('size'))}  {shown(row.get('id'))}"
             for row in dicts(run.get("attachments"))]
    yield from section(f"ATTACHMENTS  {len(lines)}", lines)
    lines = [f"{shown(row.get('serial_number'))}  ({shown(row.get('part_number'))})"
             for row in dicts(run.get("sub_units"))]
    yield from section(f"SUB-UNITS    {len(lines)}", lines)
    rows = dicts(run.get("logs"))
    lines = ["{}  {:<8}  {}  ({}:{})".format(*[shown(row.get(key)) for key in (
        "timestamp", "level", "message", "source_file", "line_number")]) for row in rows]
    yield from section("LOGS         " + tally(rows, "level")
                       + ("" if logs else "      (show them: --logs)"), lines, logs)


def section(title, lines, whole=True):
    return ["", title] + ["  " + line for line in lines if whole] if lines else []


def tally(rows, key):
    """3: 2 PASS, 1 FAIL"""
    counts = collections.Counter(shown(row.get(key)) for row in rows)
    return f"{len(rows)}: " + ", ".join(f"{count} {word}" for word, count in counts.items())


def phase_lines(phases, screen, failed_only):
    lines, paint = [], screen.paint
    room = max(20, min(58, screen.width - 19)) if screen.width else 58
    for phase in phases:
        rows = [row for row in dicts(phase.get("measurements"))
                if not failed_only or row.get("outcome") == "FAIL"]
        if failed_only and phase.get("outcome") in ("PASS", "SKIP") and not rows:
            continue
        name, retry = shown(phase.get("name")), phase.get("retry_count")
        name += f"  (attempt {retry + 1})" if retry and is_number(retry) else ""
        lines.append(f"{paint(cut(shown(phase.get('outcome')), 5))} {cut(name, room)}"
                     f"{duration_text(phase.get('duration')):>9}".rstrip())
        width = min(28, max([cells(shown(row.get("name"))) for row in rows], default=0))
        for row in rows:
            lines += measurement_lines(row, paint, width)
    return section("PHASES  " + tally(phases, "outcome"), lines)


def measurement_lines(row, paint, width):
    series, value = dicts(row.get("data_series")), row.get("measured_value")
    unit = "" if row.get("units") in (None, "") else " " + shown(row["units"])
    value = "" if value is None else dump_json(value)[:60] + unit
    limits = limits_text(row) + distance_text(row)
    if series:
        data = [part.get("data") for part in series]
        value = f"{max(len(part) if isinstance(part, list) else 0 for part in data)} points"
        limits = " / ".join(" ".join(shown(part[key]) for key in ("name", "units") if part.get(key))
                            for part in series) + limits
    name = shown(row.get("name"))
    lines = [f"  {paint(cut(shown(row.get('outcome')), 5))} {name}"
             f"{' ' * (width - cells(name))}  {value:<15} {limits}".rstrip()]
    for source in [row] + series:
        if source is not row and limits_text(source):
            lines.append(" " * 10 + limits_text(source))
        for item in dicts(source.get("aggregations")):
            limits = limits_text(item) and f" ({limits_text(item)})"
            lines.append(f"{'':10}{shown(item.get('type'))} {shown(item.get('value'))}{limits}")
    return lines


def limits_text(row):
    """The expressions of the validators; one that fails without deciding is a WARN."""
    return ", ".join(shown(rule.get("expression"), 60) + (
        " WARN" if rule.get("outcome") == "FAIL" and rule.get("is_decisive") is False else "")
        for rule in dicts(row.get("validators")))


def distance_text(row):
    """  <-- 0.9 below, for the nearest numeric limit that failed."""
    value, found = row.get("measured_value"), []
    for rule in dicts(row.get("validators")):
        limit = rule.get("expected_value")
        limits = limit if isinstance(limit, list) else [limit]
        if rule.get("outcome") == "FAIL" and is_number(value) and all(map(is_number, limits)):
            found += [(abs(value - item), "below" if value < item else "above") for item in limits]
    return "   <-- {0:.4g} {1}".format(*min(found)) if found and min(found)[0] else ""


def summary(runs):
    """(document, lines): a count for each outcome, yields of procedures, the worst serials."""
    outcomes, fails, units = collections.Counter(), collections.Counter(), {}
    for run in runs:
        outcome, serial = shown(run.get("outcome")), shown(dig(run, "unit.serial_number"))
        key = shown(dig(run, "procedure.name")), serial
        outcomes[outcome] += 1
        fails[serial] += outcome != "PASS"
        now = epoch(run.get("started_at")) or 0, outcome == "PASS"
        first, ever = units.get(key, (now, False))
        units[key] = min(first, now), ever or now[1]
    rows, total = {}, sum(outcomes.values())
    for (procedure, _), (first, ever) in units.items():
        row = rows.setdefault(procedure, {"procedure": procedure, "units": 0, "passed": 0,
                                          "passed_first": 0})
        row["units"] += 1
        row["passed"] += ever
        row["passed_first"] += first[1]
        row["yield"] = row["passed"] / row["units"]
        row["first_pass_yield"] = row["passed_first"] / row["units"]
    lines = [f"{total} runs"]
    for outcome, count in outcomes.most_common():
        part = count / total
        lines.append(f"  {outcome:<8} {count:>7}  {100 * part:5.1f} %  {'#' * round(40 * part)}")
    lines += section("YIELD", ["PROCEDURE                   UNITS   YIELD  FIRST PASS"] + [
        f"{cut(row['procedure'], 26)} {row['units']:>6} {row['yield']:7.1%} "
        f"{row['first_pass_yield']:10.1%}" for row in rows.values()])
    worst = [{"serial_number": serial, "count": count}
             for serial, count in fails.most_common(10) if count]
    lines += section("SERIALS THAT FAIL MOST", ["{count:>5}  {serial_number}".format(**row)
                                                for row in worst])
    return {"runs": total, "outcomes": dict(outcomes), "procedures": list(rows.values()),
            "failing_serials": worst}, lines


# ---- commands ------------------------------------------------------------------------------------

class Call:
    """One command line: its flags as checked values, stderr, and what the commands share."""

    def __init__(self, flags, words, fields):
        self.flags, self.words = flags, words
        self.fields = {field.name: field for field in fields}
        self.planned = []       # the requests of --dry-run
        self.stdin = None       # the flag that has read it
        self.durable = False    # a run is in the queue: exit 0, whatever comes
        self.began = None       # when there was progress to show first
        self.format = "json" if self.get("json") else self.get("format") or "table"
        self.quiet = bool(self.get("q"))
        self.made = None        # the Client, once it is asked for
        self.silent = self.format == "json" and not self.get("v")

    def get(self, name):
        """The checked value of a flag that is not part of a request, or None."""
        value, field = self.flags.get(name), self.fields.get(name)
        if value is None or field.kind == "flag":
            return value
        try:
            if field.many:
                return [check_value(field, item) for item in value]
            return check_value(field, value)
        except ValueError as error:
            raise BadInput(f"{flag(name)}: {error}") from None

    def read(self, word, name):
        """The bytes of @FILE, or of - (stdin), which stands once in a command; else the word."""
        if word == "-":
            if self.stdin:
                raise BadInput(f"- (stdin) stands twice: {flag(self.stdin)}, {flag(name)}",
                               "put one of them into a file: @FILE")
            self.stdin = name
            return sys.stdin.buffer.read() if sys.stdin else b""
        if not word.startswith("@"):
            return word
        try:
            with open(local_path(word[1:]), "rb") as file:
                return file.read()
        except OSError as error:
            raise BadInput(f"{flag(name)}: cannot read {word[1:]}: {error.strerror}",
                           "name a file that this user can read") from None

    def read_json(self, name):
        """The JSON of a flag: text, @FILE or -."""
        word = self.flags[name]
        data = self.read(word, name)
        try:
            return load_json(data)
        except ValueError as error:
            got = f"{len(data)} bytes of {word}"
            hint = f"put the JSON in a file: {flag(name)} @FILE"
            if name == "metadata" and "set" in self.fields:
                hint = "--set key=value, or " + hint
            if data is word:
                got = shown(word, 60)
                if word[:1] in ("{", "[") and '"' not in word:
                    got += "     (the shell removed the double quotes)"
                if os.path.exists(local_path(word)):
                    hint = f"{flag(name)} @{word} reads the file"
            raise BadInput(f"{flag(name)} is not JSON: {error}\n  got: {got}", hint) from None

    def values(self, operation, start=()):
        """The operation's fields as given: JSON read, IDs from @FILE, --set among the metadata."""
        values = dict(start)
        for field in OPERATIONS[operation].fields:
            value = self.flags.get(field.name)
            if value is None:
                continue
            if field.kind in ("record", "metadata", "object"):
                value = self.read_json(field.name)
            elif field.many and field.kind in ("id", "serial"):
                words, value = value, []
                for word in words:
                    data, lines = self.read(word, field.name), [word]
                    if data is not word:        # a file's bytes: one value a line
                        lines = data.decode("utf-8-sig", "replace").splitlines()
                        lines = [line for line in lines if line.strip()]
                    value += [line.strip() for line in lines]
                if not value:       # an empty filter would mean everything
                    raise BadInput(f"{flag(field.name)}: there is no value in it",
                                   "give one at least")
            values[field.name] = value
        for word in self.flags.get("set") or ():
            key, equals, text = word.partition("=")
            if not (key and equals and isinstance(values.setdefault("metadata", {}), dict)):
                raise BadInput("--set: give key=value", "such as --set shift=A --set temp=23.4")
            values["metadata"] = dict(values["metadata"], **{key: parse_word(text)})
        return values

    def wire(self, operation):
        return check(operation, self.values(operation), flags=True)

    def client(self, retries=3):
        """The Client of this command, made once: one login, one set of connections.

        `retries`: how often it tries again where no flag says it.
        """
        given, path = self.get("retries"), self.get("api_key_file")
        if self.made is None:
            self.made = Client(
                url=self.get("url"), ca_cert=self.get("ca_cert"),
                timeout=self.get("timeout") or 30, allow_http=bool(self.get("allow_http")),
                notify=self.warn, trace=self.note if self.get("v") else None,
                plan=self.plan if self.get("dry_run") else None,
                source=f"--api-key-file {path}", api_key=self.read_key(path))
            self.made.waits = []
        self.made.retries = retries if given is None else given
        return self.made

    def read_key(self, path):
        """The key in --api-key-file, None without that flag."""
        if path is None:
            return None
        try:
            key = self.read(path if path == "-" else "@" + path, "api_key_file")
        except BadInput as error:
            if path == "-":
                raise
            if not re.search(r"[./\\]", path):      # it may be the key
                error.message = "--api-key-file: there is no such file"
            raise AccessDenied(error.message, error.hint) from None
        return key.decode(json.detect_encoding(key), "replace")     # Notepad, PowerShell

    def plan(self, method, url, body):
        """What --dry-run does in place of sending."""
        self.planned.append({"method": method, "url": url, "body": body})
        return {"id": [] if method == "DELETE" else "ID", "upload_url": "URL", "url": "URL",
                "data": [], "meta": {}}

    def note(self, text):
        """A line on stderr."""
        if not self.silent:
            with contextlib.suppress(OSError, ValueError):      # it must not change the result
                print(shown(text), file=sys.stderr, flush=True)

    def warn(self, text):
        self.note("warning: " + text)

    def log(self, text):
        """A line with the time on stdout, while queue send is at work."""
        if self.format == "table" and not self.quiet:
            print(time.strftime("%Y-%m-%d %H:%M:%S%z"), shown(text), flush=True)

    def live(self, text, last):
        """A line on a terminal that is written over, once a command takes more than 2 s."""
        self.began = self.began or time.monotonic()
        if time.monotonic() - self.began > 2 and isatty(sys.stderr) and not self.silent:
            print(f"\r{text}  ", end="\n" if last else "", file=sys.stderr, flush=True)

    def progress(self, file, sent):
        self.live(f"Uploading {shown(file.name, 40)} {100 * sent // file.size:3d}%  "
                  f"{size_text(sent)} of {size_text(file.size)}", sent == file.size)


def run_ls(call):
    filters, client = call.wire("list"), call.client()
    limit, whole = filters.pop("limit", None), call.get("all") or call.get("summary")
    if re.search(r"\bmetadata\b", call.get("columns") or ""):
        filters.setdefault("include_metadata", True)
    if limit and call.get("all"):
        raise BadInput("--limit and --all exclude each other", "give one of them")
    limit = limit if whole else limit or 50
    pages = client.pages(limit, call.get("page_size") or 100, **filters)
    first = next(pages)
    if not first[0] and call.get("fail_empty") and not client.plan:
        raise NotFound("no run matches", "that is what --fail-empty asks for")

    def all_pages():
        count, (rows, meta) = len(first[0]), first
        yield first
        try:
            for rows, meta in pages:
                count += len(rows)
                if whole and (call.get("out") or not isatty(sys.stdout)):
                    call.live(f"{count} runs", not meta.get("has_more"))
                yield rows, meta
        except Error as error:
            error.hint = f"{error.hint}\nto go on from here: --cursor {error.cursor}".lstrip()
            raise
        if not count:
            call.note("no run matches")
        if meta.get("has_more") and not whole:
            call.note(f"{count} shown, more exist: --all, or --cursor {meta['next_cursor']}")
    if not call.get("summary"):
        return Result(pages=all_pages(), columns=RUN_COLUMNS)
    document, lines = summary(row for rows, _ in all_pages() for row in rows)
    return Result(document, lines, document["procedures"], ids=())


def run_get(call):
    client, folder, saved = call.client(), call.get("download"), []
    run = client.get(call.wire("get")["id"])
    for row in dicts(run.get("attachments")) if folder else ():
        if row.get("download_url"):
            saved.append(shown(download(client, row, folder)))
        else:
            call.warn(f"{shown(row.get('name'))} has no content: its upload was not finished")

    def lines(screen):
        yield from report(run, screen, run_link(client, dig(run, "procedure.id"), run.get("id")),
                          call.get("failed_only"), call.get("logs"))
        yield from section("SAVED", saved)
    status = 10 if call.get("exit_status") and run.get("outcome") != "PASS" else 0
    return Result(run, lines, columns=RUN_COLUMNS, status=status)


def run_link(client, procedure_id, run_id):
    """The run's page, where the organization is known from the credentials file."""
    if client.login.slug and procedure_id:
        return shown(f"{client.login.url}/{client.login.slug}/{procedure_id}/runs/{run_id}")


def run_create(call):
    start = call.read_json("body") if call.flags.get("body") else {}
    if not isinstance(start, dict):
        raise BadInput("--body: must be a JSON object")
    values = call.values("create", start)
    if values.get("client_run_ref"):        # with it even "now" is the same run each time
        for name in ("started_at", "ended_at"):
            with contextlib.suppress(AttributeError, TypeError, ValueError, OverflowError):
                values[name] = parse_time(values.get(name), datetime.datetime.now().astimezone())
    body = with_ref(check("create", values, flags=True))
    if epoch(body["ended_at"]) > time.time() + 3600:
        call.warn(f"the run ends in the future, {body['ended_at']}: is this machine's clock right?")
    for key in set(body) - {field.name for field in CREATE}:
        call.warn(f"{key} is no field that this version knows: it is sent as it is")
    files = [LocalFile(path) for path in call.get("attach") or ()]
    for name, count in collections.Counter(file.name for file in files).items():
        if count > 1:
            raise BadInput(f"--attach: {name} stands twice",
                           "rename one file: on a run its name tells it from the others")
    if not call.get("dry_run") and (call.get("queue") or call.get("offline")
                                    or os.environ.get("TOFUPILOT_QUEUE")):
        return create_queued(call, body, files)
    return create_now(call, body, files)


def create_now(call, body, files):
    client = call.client()
    try:
        run_id = client.send_create(body)["id"]
    except Unavailable as error:
        if not error.sent:
            error.hint += "\nto keep runs meanwhile, add --queue FILE"
        raise
    document, lines = {"id": run_id}, created_lines(client, body, run_id)
    try:
        lines += ["  " + line for line in attach_lines(call, client, run_id, files)]
    except KeyboardInterrupt as stopped:
        stopped.id = run_id
        raise
    except Error as error:
        there = [file for file in files if file.done]
        try:
            if 0 < len(there) < len(files):     # what went up is linked at least
                attach(client, run_id, there)
        except Error:
            there = []
        left = [file.name for file in files if file not in there] or [file.name for file in files]
        error.message = (f"run {run_id} is stored, {len(left)} of {len(files)} attachments not: "
                         f"{', '.join(left)}\n{error.message}")
        error.hint, error.id = "run the same command again; only what is missing goes up", run_id
        raise
    if files:
        document["attachments"] = [{"id": file.upload_id, "name": file.name} for file in files]
    return Result(document, lines)


def created_lines(client, body, run_id, told="Created run"):
    phases = body.get("phases", ())
    count = sum(len(phase.get("measurements") or ()) for phase in phases)
    facts = [body["outcome"], body["serial_number"],
             phases and f"{counted(len(phases), 'phase')}, {counted(count, 'measurement')}",
             seconds_text(epoch(body["ended_at"]) - epoch(body["started_at"]))]
    lines = ["  ".join(filter(None, facts)), run_link(client, body["procedure_id"], run_id)]
    return [f"{told} {run_id}"] + ["  " + line for line in lines if line]


def attach_lines(call, client, run_id, files):
    """Attaches files to a run that exists: a line for each."""
    new = attach(client, run_id, files, call.progress) if files else []
    return [f"{'Attached' if file in new else 'Already there:'} {file.name}  "
            f"{size_text(file.size)}  {file.upload_id}" for file in files]


def create_queued(call, body, files):
    """Stores a run, then sends it and older ones for ten seconds at most."""
    path, origin, problems, offline = queue_path(call), None, [], call.get("offline")

    def send():     # in a thread of its own
        try:
            with Queue(path) as queue:
                work = Pass(queue, call.client(0))
                work.run()
                problems.extend(entry["error"] for entry in work.unsent)
        except Exception as error:      # the run is stored: nothing here is a failure
            problems.append(str(error))
    with contextlib.ExitStack() as stack:
        try:
            if not offline:
                with contextlib.suppress(Error):        # it is told when it is sent
                    origin = call.client(0).login.url
            # open to the end: to close it would drop the locks of the thread's connection
            queue = stack.enter_context(Queue(path))
            entry = queue.store(body, files, origin)
        except Unavailable as error:
            return create_unqueued(call, body, files, error)
        call.durable, before = True, entry["state"]
        if not offline and before == "waiting":
            within(10, send)
        entry, meta = queue.find(entry["ref"]), queue.meta()
        oldest = queue.sql("SELECT min(stored_at) FROM entry WHERE state = 'waiting'")[0][0]
    if meta["parked"] or oldest and time.time() - oldest > 86400:
        call.warn(f"{counted(meta['parked'], 'run')} parked, {meta['waiting']} waiting in {path}: "
                  f"see {PROG} queue ls")
    run_id = entry["run_id"] if entry["state"] == "sent" else None
    document = {"id": run_id, "queued": not run_id, "client_run_ref": entry["ref"]}
    if run_id:
        told = "Sent before: run" if before == "sent" else "Created run"
        return Result(document, created_lines(call.client(0), body, run_id, told) + [
            f"  Attached {file.name}  {size_text(file.size)}" for file in files])
    lines = [f"Queued {entry['ref'][:12]} in {path}, {entry['state']}; {meta['waiting']} wait"]
    if entry["target"]:
        lines.append("  moved to " + entry["target"].partition(" ")[2])
    elif entry["error"] or problems:
        lines.append("  " + shown(entry["error"] or problems[0], 300))
    return Result(document, lines, ids=())


def create_unqueued(call, body, files, error):
    """The queue cannot be written: sends the run directly, or says that it is NOT stored."""
    if not call.get("offline"):
        call.warn(f"{error.message}; the run is sent directly")
        try:
            return create_now(call, body, files)
        except Error as failure:
            if failure.id:
                raise       # the run is stored, a file is not
            error = failure
    raise Unavailable(error.message + "\nthe run is NOT stored in the queue", error.hint,
                      error.status, error.code, error.issues) from None


def within(seconds, work):
    """Runs work() in a thread and goes on when it is done or the time is over, or on Ctrl-C."""
    import threading
    thread = threading.Thread(target=work, daemon=True)
    with contextlib.suppress(KeyboardInterrupt):
        thread.start()
        thread.join(seconds)


def queue_path(call):
    return (call.get("queue") or os.environ.get("TOFUPILOT_QUEUE")
            or os.path.join(home(), "runs.queue"))


def open_queue(call, changes=False):
    """The queue that a command works on; `changes`: without a request, so no --dry-run of it."""
    if changes and call.get("dry_run"):
        raise BadInput("--dry-run: this command sends no request, it changes the queue",
                       "queue ls shows what is in it")
    return Queue(queue_path(call), must_exist=True)


QUEUE_COLUMNS = (("REF", "client_run_ref"), ("STATE", "state"), ("OUTCOME", "outcome"),
                 ("SERIAL", "serial_number"), ("STORED", "stored_at"), ("TRIES", "tries"),
                 ("ERROR", "error"))


def entry_json(entry):
    """An entry as queue ls shows it."""
    found = {name: entry[name] for name in ("state", "outcome", "serial_number", "procedure_id",
                                            "stored_at", "tries", "next_try_at", "error", "run_id")}
    for name in ("stored_at", "next_try_at"):
        at = datetime.datetime.fromtimestamp(found[name], _UTC) if found[name] else None
        found[name] = at and at.isoformat()[:19] + "Z"
    return dict(found, client_run_ref=entry["ref"], attachments=entry["files"])


def queue_text(meta):
    """2 waiting, 1 parked, and what a move that was interrupted holds back."""
    told = f"{meta['waiting']} waiting, {meta['parked']} parked"
    return told + (f", {meta['moving']} moving (repeat that move)" if meta["moving"] else "")


def run_queue_ls(call):
    with open_queue(call) as queue:
        hidden = "" if call.get("sent") else ", 'sent', 'moved'"
        rows = list(map(entry_json, queue.entries(f"state NOT IN ('storing'{hidden})")))
        meta = queue.meta()
    call.note(f"{queue_text(meta)}, {size_text(meta['bytes'])} in {meta['file']}")
    del meta["moving"]      # the rows say it; the document has the keys that were promised
    run = (("RUN", "run_id"),) if call.get("sent") else ()
    return Result({"data": rows, "meta": meta}, rows=rows,
                  ids=[row["client_run_ref"] for row in rows],
                  columns=QUEUE_COLUMNS[:2] + run + QUEUE_COLUMNS[2:])


def run_queue_get(call):
    folder, saved = call.get("download"), []
    with open_queue(call) as queue:
        entry = queue.find(refs(call, 1)[0])
        files, body = queue.files(entry["id"]), queue.body(entry["id"])
        for file in files if folder and body else ():
            if file.done and not next(file.blocks(), b""):
                call.warn(f"{file.name} went up already and is not in the queue any more")
                continue
            saved.append(save_new(folder, file.name,
                                  lambda out, file=file: out.writelines(file.blocks())))
    shows = entry_json(entry)
    if not body and call.format == "json":
        raise NotFound(f"the request of {entry['ref'][:12]} is gone: it is {entry['state']}",
                       "queue ls --sent --json shows what is left")
    lines = [f"{name:<15} {value}" for name, value in shows.items() if value not in (None, "")]
    lines += section("ATTACHMENTS", [f"{file.name}  {size_text(file.size)}" for file in files])
    request = json.loads(body or "{}")
    if body and entry["ref"] == entry["content"]:       # create makes it anew, from the content
        del request["client_run_ref"]
    return Result(request, lines + section("SAVED", saved), ids=[entry["ref"]])


def refs(call, count=None, needs="a REF is needed: queue ls shows them, the beginning is enough"):
    """The REFs that a queue command was given."""
    if not call.words or count and len(call.words) != count:
        raise BadInput(needs, f"{PROG} queue --help")
    return call.words


def run_queue_rm(call):
    with open_queue(call, changes=True) as queue:
        entries = [queue.find(word) for word in refs(call)]
        ask(call, f"Remove {counted(len(entries), 'run')} from the queue?")
        with queue.transaction():
            for entry in entries:
                queue.drop("id = ?", entry["id"])
        queue.tidy()
    gone = [entry["ref"] for entry in entries]
    return Result({"client_run_ref": gone}, [
        "Removed {0} {serial_number} {outcome} ({state})".format(entry["ref"][:12], **entry)
        for entry in entries], ids=gone)


def ask(call, question):
    """Asks on a terminal, and goes on elsewhere or with --yes."""
    asks = isatty(sys.stdin) and isatty(sys.stderr) and not call.get("dry_run")
    if asks and not call.get("yes"):
        print(question, "This cannot be undone. Type y: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Stopped("nothing was deleted")


def run_queue_send(call, retry=False):
    """`retry`: the REFs that were given, or all, go now, parked ones too."""
    if call.get("jitter"):
        time.sleep(delay(0, call.get("jitter")))
    client, force = call.client(0), set()
    with open_queue(call) as queue:
        if client.plan:
            for entry in queue.entries("state = 'waiting'"):
                client.send_create(json.loads(queue.body(entry["id"])))
            return None
        if retry:
            entries = ([queue.find(word) for word in call.words]
                       or queue.entries("state IN ('waiting', 'parked')"))
            force = {entry["ref"] for entry in entries}
            for entry in entries:
                if entry["state"] == "parked":
                    queue.change(entry["id"], state="waiting", next_try_at=0)
        work = Pass(queue, client, call.log, force)
        alone, meta = work.run(), queue.meta()
        soon = queue.sql("SELECT min(next_try_at) FROM entry WHERE state = 'waiting'")[0][0]
    codes = {entry["exit_code"] for entry in work.unsent}
    if not alone:
        call.note("another process is sending this queue: nothing to do")
    elif meta["parked"]:
        codes.add(5)
    runs = [{"client_run_ref": entry["ref"], "id": entry["run_id"]} for entry in work.sent]
    told = f"{len(runs)} sent, {queue_text(meta)}"
    if soon and soon > time.time():
        told += f"; next try {ago(time.time() - soon)}"
    call.log(told)
    result = Result(dict(sent=len(runs), waiting=meta["waiting"], parked=meta["parked"], runs=runs),
                    [], runs, status=next((code for code in (3, 5, 6) if code in codes), 0))
    if result.status and (call.quiet or call.format == "json"):     # else the lines have told it
        result.error = {3: AccessDenied, 5: Refused, 6: Unavailable}[result.status](
            told + "".join(f"; {entry['serial_number']}: {entry['error']}"
                           for entry in work.unsent[:3]), f"{PROG} queue ls tells why")
    return result


def run_queue_move(call):
    with open_queue(call, changes=True) as queue:
        count, path = move(queue, refs(call, 1, "a FILE is needed: the queue to move to")[0])
    return Result({"moved": count, "file": path}, [
        f"Moved {counted(count, 'run')} to {path}, which holds the only copy now" if count
        else "Nothing is waiting"], ids=())


def run_update(call):
    wire = call.wire("update")
    answer = call.client().update(**wire)
    return Result(answer, [f"Updated run {answer['id']}: "
                           f"{counted(len(wire.get('attachments', ())), 'attachment')} linked"])


def run_update_metadata(call):
    wire = call.wire("update_metadata")
    if not wire.get("metadata"):
        raise BadInput("--metadata or --set is missing", "such as --set shift=A")
    kept = [key for key, value in wire["metadata"].items() if value is not None]
    gone = [key for key, value in wire["metadata"].items() if value is None]
    answer = call.client().update_metadata(**wire)
    told = "; ".join(f"{done} {', '.join(keys)}" for done, keys in (
        ("set", kept), ("removed", gone)) if keys)
    return Result(answer, [f"Updated metadata of run {answer['id']}: {told}"])


def run_create_attachment(call):
    values, path = call.values("create_attachment"), call.get("file")
    file = LocalFile(path, values.get("name")) if path else None
    if file:
        values["name"] = file.name
    if not values.get("name"):
        raise BadInput("--file is missing (--name reserves a place)", "such as --file log.txt")
    wire, client = check("create_attachment", values, flags=True), call.client()
    if file:
        lines = attach_lines(call, client, wire["id"], [file]) + [f"  run {wire['id']}"]
        return Result({"id": file.upload_id, "name": file.name}, lines)
    try:
        answer = client.create_attachment(**wire)
    except Unavailable as error:
        if error.sent:
            error.hint = ("look with get before you try again: an empty attachment may be left\n"
                          "on the run. create-attachment --file does not have this problem")
        raise
    return Result(answer, [
        f"Attachment {answer['id']} reserved on run {wire['id']}",
        "It has no content yet. The upload URL works for about 60 seconds:",
        "  " + answer["upload_url"], "Upload, then finalize:",
        f"  curl -X PUT -H 'Content-Type: {content_type(wire['name'])}' -T FILE 'URL'",
        f"  {PROG} attachments finalize --id {answer['id']}", "Easier, in one step:",
        f"  {PROG} create-attachment --id {wire['id']} --file FILE"])


def run_initialize(call):
    answer = call.client().initialize(**call.wire("initialize"))
    return Result(answer, [f"Upload {answer['id']}: PUT the bytes within 60 seconds to",
                           "  " + answer["upload_url"], "Then:",
                           f"  {PROG} attachments finalize --id {answer['id']}",
                           f"  {PROG} update --id RUN --attachments {answer['id']}"])


def run_finalize(call):
    wire = call.wire("finalize")
    answer, id = call.client().finalize(**wire), wire["id"]
    return Result(answer, [f"Finalized upload {id}", "  " + answer["url"]], ids=[id])


def run_rm(call):
    ids, client = list(dict.fromkeys(call.wire("delete")["ids"])), call.client()
    ask(call, f"Delete {counted(len(ids), 'run')}?")
    gone = client.delete(ids)["id"]
    kept = [id for id in ids if id not in gone]
    lines = [f"Deleted {counted(len(gone), 'run')}"] + [f"  {id}" for id in gone]
    if kept:
        lines += [f"Not there: {len(kept)}"] + [f"  {id}" for id in kept]
    return Result({"id": gone}, lines, [{"id": id} for id in gone])


def run_check(call):
    """A line for each thing that a station needs, ok or FAIL; exits as its first failure does."""
    rows, lines, status, client, path = [], [], 0, call.client(), queue_path(call)

    def queue():
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.exists(path):
            if not os.access(folder, os.W_OK) and (folder != home() or os.path.exists(folder)):
                raise Unavailable(f"cannot make {path}: no folder that this user can write",
                                  "make the folder, or name another queue")
            return f"none at {path}"
        with Queue(path) as queue:
            waits, meta = queue.entries("state = 'waiting'"), queue.meta()
        strange = list(filter(None, (elsewhere(entry, client.login.url) for entry in waits)))
        if meta["parked"] or meta["moving"] or strange:
            kind = Refused if meta["parked"] else Unavailable
            raise kind("; ".join([f"{queue_text(meta)} in {path}"] + strange[:1]),
                       f"{PROG} queue ls tells why")
        oldest = f", oldest {ago(time.time() - waits[0]['stored_at'])}" if waits else ""
        return f"{len(waits)} waiting{oldest}, {meta['bytes']} bytes in {path}"

    def key():
        if not client.login.key:
            raise no_key()
        return f"from {client.login.source}"

    def identity():
        found = client.whoami()
        name = dig(found, "station.name") or dig(found, "user.email")
        return f"{found.get('type')} {name} of {dig(found, 'organization.name')}"

    def clock():
        theirs, ours = client.transport.clocks or (0, 0)
        off = round(ours - theirs)
        if abs(off) > 120:
            raise BadInput(f"{abs(off)} s {'ahead of' if off > 0 else 'behind'} the server",
                           "set this machine's clock: certificates and times depend on it")
        return f"{abs(off)} s from the server's" if theirs else "not compared: no answer"
    about = [line.split(None, 1) for line in version_text().splitlines()]
    for name, get in about + [
            ("url", lambda: client.login.url), ("key", key), ("proxy", lambda: proxy_of("https")),
            ("ca", lambda: client.transport.ca_cert or "the system's"),
            ("queue", queue), ("identity", identity), ("clock", clock)]:
        try:
            text, error = get() if callable(get) else get, None
            mark = "-   " if text.startswith("not ") else "ok  "
        except Error as failure:
            text, error, mark = failure.message, failure.as_json(), "FAIL"
            status = status or failure.exit_code
            if text in [row["text"] for row in rows]:
                continue        # told already
        rows.append({"name": name, "ok": not error, "text": text, "error": error})
        lines.append(f"{mark}  {name:<9} {' '.join(text.split())}")
        if error:
            lines.append("      Fix: " + " ".join((error["hint"] or "").split()))
    return Result({"data": rows}, lines, rows, ids=(), status=status,
                  columns=[(key, key) for key in ("name", "ok", "text")])


def version_text():
    path = os.path.abspath(__file__)
    with open(path, "rb") as file:
        sha256 = digest([file.read()])
    try:
        from ssl import OPENSSL_VERSION as openssl
    except ImportError:
        openssl = "no ssl in this Python"
    return (f"version  {PROG} {__version__}\nsha256   {sha256}\n"
            f"python   {sys.version.split()[0]} on {sys.platform}\nopenssl  {openssl}\n"
            f"path     {path}\n")


# ---- command line --------------------------------------------------------------------------------

Command = collections.namedtuple("Command", "run fields sentence examples words")

GLOBAL = _table("""
output:
  json flag | the server's JSON on stdout, and errors as JSON on stderr
  format enum table json jsonl csv | form of the output | csv
  columns text | fields to show, for table, csv and jsonl | id,unit.serial_number
  out path | write to a file, replaced at the end only | runs.csv
  q flag | IDs only / v flag | a line for each request on stderr
  dry_run flag | print the requests, send nothing
connection:
  url text | the server, else TOFUPILOT_URL, else the credentials file, else the cloud | \
https://tofupilot.example.com
  api_key_file path | file with the key, or -; else TOFUPILOT_API_KEY, else \
~/.tofupilot/credentials.json | /etc/tofupilot.key
  ca_cert path | a private CA, besides the system's; else TOFUPILOT_CA_CERT | factory.pem
  timeout seconds | seconds for each wait on the network (30) | 10
  retries count | tries after the first (3) | 0
  allow_http flag | plain http to another machine
""")
SET = _table("metadata: / set text* | a key without JSON quoting; a number only as JSON writes it "
             "(1.5, not 1.50), else text | shift=A temp=23.4")
QUEUE = _table("queue: / queue path | the queue file; else TOFUPILOT_QUEUE, else runs.queue in "
               "~/.tofupilot | line3.queue")


def _command(run, fields, text, words=""):
    """A Command of a text: one sentence, then examples ($) and the rows of flags of its own.

    `words`: what it takes besides flags, as the usage line says it.
    """
    sentence, *lines = text.split("\n")
    rows = "\n".join(line for line in lines if line[:1] != "$")
    examples = [line[1:] for line in lines if line[:1] == "$"]
    return Command(run, fields + _table(rows), sentence, examples, words)


COMMANDS = {
    "ls": _command(run_ls, LIST, """List runs, newest first.
$ --procedure-ids proc_abc --outcomes PASS --limit 50
$ --started-after 24h --outcomes FAIL --format csv --out failures.csv
$ --serial-numbers SN-0001 --fail-empty -q
$ --started-after 7d --summary
page and order: / all flag | all runs that match / page_size page | rows a request, 1 to 100 | 100
output: / fail_empty flag | exit 4 when no run matches
  summary flag | counts, yields, the serials that fail most, over all pages"""),
    "get": _command(run_get, ID, """Show a run: verdict, phases, measurements, files.
$ --id run_abc123
$ --id run_abc123 --failed-only --logs
$ --id run_abc123 --download evidence
output: / failed_only flag | phases and measurements that failed / logs flag | the log lines too
  download path | save all attachments in a folder | evidence
  exit_status flag | exit 10 unless the run is PASS"""),
    "create": _command(run_create, CREATE + SET + QUEUE, """\
Create a run. The same command again is the same run.
$ --outcome PASS --procedure-id proc_abc --serial-number SN-0001 --started-at \
2026-05-19T08:00:00Z --ended-at 2026-05-19T08:00:42Z
$ --body @run.json --attach report.pdf scope.png
$ --body @run.json --queue line3.queue
content: / body text | the whole request as JSON; flags override its fields | @run.json
  attach path* | files to upload and link | report.pdf scope.png
queue: / offline flag | store in the queue only: no network, no key"""),
    "update": _command(run_update, OPERATIONS["update"].fields, """Link uploads to a run.
$ --id run_abc --attachments att_1 att_2"""),
    "update-metadata": _command(
        run_update_metadata, OPERATIONS["update_metadata"].fields + SET, """\
Set or delete keys of a run's metadata; the others stay.
$ --id run_abc --metadata '{"shift":"A","temp":23.4}'
$ --id run_abc --set shift=A --set lot=null"""),
    "create-attachment": _command(run_create_attachment, ID + NAME, """\
Attach a file to a run, or reserve a place for one.
$ --id run_abc --file report.pdf
$ --id run_abc --name report.pdf
file: / file path | upload this file and link it; --name is then its own | report.pdf"""),
    "rm": _command(run_rm, OPERATIONS["delete"].fields, """\
Delete runs, with all that belongs to them.
$ --ids run_a run_b
$ --ids @old.txt --yes
output: / yes flag | do not ask"""),
    "attachments initialize": _command(run_initialize, NAME, """Make an upload that no run has yet.
$ --name report.pdf"""),
    "attachments finalize": _command(run_finalize, OPERATIONS["finalize"].fields, """\
Close an upload whose bytes were PUT by hand.
$ --id att_1"""),
    "queue ls": _command(run_queue_ls, QUEUE, """\
List the runs that wait, and those that the server refused (parked).
$
$ --queue line3.queue --sent
output: / sent flag | receipts of the last 30 days too"""),
    "queue get": _command(run_queue_get, QUEUE, """\
Show an entry of the queue (REF); --json is its request, for create --body.
$ 3e1f7d02
$ 3e1f7d02 --json --out run.json
output: / download path | save its attachments in a folder | evidence""", "REF"),
    "queue send": _command(run_queue_send, QUEUE, """Send what is due, oldest first. For cron.
$ --jitter 60
$ --queue line3.queue
queue: / jitter seconds | wait up to so long first: many stations share a minute | 60"""),
    "queue retry": _command(lambda call: run_queue_send(call, retry=True), QUEUE, """\
Send parked and waiting runs (REFs, or all) without waiting.
$
$ 3e1f7d02""", "[REF ...]"),
    "queue rm": _command(run_queue_rm, QUEUE, """Remove entries (REFs) from the queue, unsent.
$ 3e1f7d02
output: / yes flag | do not ask""", "REF ..."),
    "queue move": _command(run_queue_move, QUEUE, """\
Hand all waiting runs to another queue file, such as on a stick.
$ /media/stick/line3.queue""", "FILE"),
    "check": _command(run_check, QUEUE, """\
Is this station set up? The first command on a new one.
$"""),
}

SUMMARY = f"""usage: {PROG} COMMAND [flags]    manual: {PROG} --help

  ls                  list runs            get               show one
  create              store a run          rm                delete runs
  update              link uploads         update-metadata   set or delete keys
  create-attachment   attach a file        attachments       uploads by hand
  queue               runs that wait       check             is this set up?

first steps: export TOFUPILOT_API_KEY=..., then {PROG} check
"""

MANUAL = f"""{PROG} {__version__}: the test runs of a TofuPilot server, from one file.

{SUMMARY}
Each command's help has examples and every flag:  {PROG} ls --help
The word runs may stand before a command. List flags take several words and may
be repeated. JSON flags also take @FILE, or - for stdin. A value that begins
with - needs = before it. Times: ISO 8601, local without an offset; in ls also
24h, 7d, now.

every command
  --json             the server's JSON; errors as JSON on stderr
  --format FORMAT    table, json, jsonl, csv     --columns id,outcome
  --out FILE         written beside, replaced at the end
  -q, -v             IDs only; a line for each request
  --dry-run          print the requests, send nothing
  --url URL          the server                  --api-key-file FILE
  --ca-cert FILE     a private CA                --timeout S, --retries N
  --allow-http       plain http to another machine
  --version          version and sha256 of this file, Python, OpenSSL

exit status
  0  done, or stored in the queue          4  not found
  1  unexpected: a bug, a disk error       5  the server refused the data
  2  wrong usage; nothing was sent         6  unavailable: the same again later
  3  no key, or not allowed               10  --exit-status: it is not PASS
  130, 143  stopped by Ctrl-C or SIGTERM

environment
  TOFUPILOT_API_KEY   the key             TOFUPILOT_URL     the server
  TOFUPILOT_CA_CERT   a private CA        TOFUPILOT_QUEUE   the queue file
  TOFUPILOT_HOME      else ~/.tofupilot   HTTPS_PROXY, NO_PROXY, NO_COLOR

queue
  create --queue FILE stores the run first, then sends it: exit 0 is safe
  whatever the network does. create --offline only stores it. queue send, from
  cron, sends what waits. queue move FILE hands all to a stick; never copy it.
"""


METAVARS = dict(id="ID", duration="DURATION", time="TIME", when="TIME", seconds="S", record="JSON",
                metadata="JSON", object="JSON", integer="N", limit="N", count="N", page="N",
                path="FILE", boolean="true|false")      # by kind; else a flag's last word


class Parser(argparse.ArgumentParser):
    """The parser of a command or of a word before others. Its flags, or the commands below it, come
    when it is called; what is wrong is raised."""

    def __init__(self, path="", **_):       # argparse offers a prog of its own, 3.14 a color
        def form(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30,
                                                        width=min(100, terminal_width()) - 1)
        words = COMMANDS[path].words if path in COMMANDS else ""
        usage = " ".join(filter(None, [PROG, path, words, "[flags]"]))
        super().__init__(f"{PROG} {path}".rstrip(), usage, add_help=False, formatter_class=form,
                         argument_default=argparse.SUPPRESS)
        self.path, self.color = path, False
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def parse_known_args(self, args=None, namespace=None):
        command = COMMANDS.get(self.path)
        if command:
            self.set_defaults(entry=self.path)
            lines = [f"  {PROG} {self.path}{line}" for line in command.examples]
            self.description = "\n".join([command.sentence, ""] + [
                re.sub(r"^(.{1,76}) (?=--)", r"\1 \\\n      ", line) if len(line) > 79 else line
                for line in lines])
            add_flags(self, command.fields + GLOBAL)
        else:
            add_flags(self, GLOBAL)
            tree = self.add_subparsers(dest=self.path + " word")
            words = [] if self.path else ["runs", "attachments", "queue"]
            for name in inner_commands(self.path) + words:
                tree.add_parser(name.rpartition(" ")[2], path=name)
        return super().parse_known_args(args, namespace)

    def format_help(self):
        if self.path in COMMANDS:
            return super().format_help()
        return f"usage: {PROG} {self.path} COMMAND [flags]\n\n" + "".join(
            f"  {name:<24}{COMMANDS[name].sentence}\n"
            for name in inner_commands(self.path)) if self.path else MANUAL

    def _get_option_tuples(self, option_string):
        # no abbreviations; allow_abbrev=False would refuse -qv before 3.8
        return [] if option_string.startswith("--") else super()._get_option_tuples(option_string)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            meant = closest(value, list(action.choices))
            raise BadInput(f"there is no command {shown(value, 60)}",
                           f"did you mean {meant}?" if meant else f"{PROG} --help lists them")

    def error(self, message):
        raise BadInput(message.replace("argument ", "", 1), f"see {self.prog} --help"
                       + ("; a value that begins with - needs = before it"
                          if "expected" in message else ""))


def add_flags(parser, fields):
    """The flags of a table's rows, in groups. A flag that is not given is not in the result."""
    groups = {title: parser.add_argument_group(title)
              for title in dict.fromkeys(field.group for field in fields)}
    for field in fields:
        name, last_word = flag(field.name), field.name.rstrip("s").rpartition("_")[2]
        more = {"metavar": METAVARS.get(field.kind) or last_word.upper()}
        if field.kind == "flag":
            more = {"action": "store_true"}
        if field.kind == "boolean":
            more.update(nargs="?", const="true")
        if field.many and not field.fields:
            more.update(nargs="+", action="append")
            if name.endswith("s"):      # the singular, accepted in silence
                parser.add_argument(name[:-1], dest=field.name, help=argparse.SUPPRESS, **more)
        text = ": ".join(filter(None, [field.help, " ".join(field.choices)]))
        text += f"; e.g. {field.example}" if field.example and field.kind != "boolean" else ""
        groups[field.group].add_argument(name, help=text.replace("%", "%%"), **more)


def inner_commands(path):
    """The commands that begin with this word; without one, or after runs, those of one word."""
    if path in ("", "runs"):
        own = {"check"} if path else set()      # check is about the station: no command of runs
        return [key for key in COMMANDS if " " not in key and key not in own]
    return [key for key in COMMANDS if key.startswith(path + " ")]


def parse(argv):
    """(command, its Call) of a command line; BadInput for what is wrong."""
    found, words = Parser().parse_known_args(argv)
    found = vars(found)
    path = found.pop("entry", "")
    fields = (COMMANDS[path].fields if path else ()) + GLOBAL
    known = {flag(field.name): field for field in fields}
    for word in words:
        word = word.partition("=")[0]
        if word.startswith("-") and word != "-" and word not in known:
            meant = closest(word, list(known))
            raise BadInput(f"unknown option {word[:60]}", (
                f"did you mean {meant}? Example: {path} {meant} {known[meant].example}"
                if meant else f"{PROG} {path}".strip() + " --help lists them"))
    if not path:
        raise BadInput("a command is missing",
                       "one of: " + ", ".join(inner_commands(found.get(" word") or "")))
    if words and not COMMANDS[path].words:
        raise BadInput(f"unexpected word {words[0][:60]}",
                       f"values follow their flag: {flag(fields[0].name)} {words[0][:60]}?")
    for field in fields:
        if field.name in found and field.many and not field.fields:
            found[field.name] = sum(found[field.name], [])
    return path, Call(found, words, fields)


def execute(argv):
    """Runs a command line and writes its result. Returns the exit status."""
    if argv[:1] == ["help"]:
        argv = argv[1:] + ["--help"]
    if argv in (["--version"], ["--help"], ["-h"]):
        sys.stdout.write(version_text() if argv == ["--version"] else MANUAL)
        return 0
    if not argv:
        sys.stderr.write(SUMMARY)
        return 2
    name, call = parse(argv)
    catch_signals()
    out, how, result = call.get("out"), (call.format, call.get("columns"), call.quiet), None
    stored = name == "create" and not call.get("dry_run")
    try:
        result = COMMANDS[name].run(call)
        if call.get("dry_run"):
            result, how = Result({}, [dump_json(request) for request in call.planned]), ()
        if out and out not in ("-", "/dev/stdout"):
            write_file(out, result, *how)
        else:
            Screen(sys.stdout, *how).write(result)
    except (OSError, Error, KeyboardInterrupt) as error:
        if call.durable:        # a run that is stored stays stored: exit 0, whatever comes
            drop_stdout()
            return 0
        if result and stored:
            error.id = result.document["id"]
        raise
    finally:
        if call.made:
            call.made.close()
    if result.error:
        raise result.error
    return result.status


def catch_signals():
    def stop(number, _):
        sys.unraisablehook = lambda _: None     # what was half made would tell of it, from 3.8 on
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
    with contextlib.suppress(ValueError):       # not in the main thread
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, stop)


def write_file(path, result, *how):
    """Writes beside the file and renames at the end: what fails leaves the old file."""
    path = os.path.realpath(path)
    special = os.path.exists(path) and not os.path.isfile(path)     # a device, a FIFO: as it is
    with part_of(path) as part:
        with open(path if special else part, "w", encoding="utf-8", newline="") as file:
            if os.path.isfile(path):
                os.chmod(part, stat.S_IMODE(os.stat(path).st_mode) | stat.S_IWUSR)
            Screen(file, *how).write(result)
        if not special:
            replace(part, path)


def drop_stdout():
    """What is still to be written to stdout goes nowhere: it is closed, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def prepare_streams():
    """stdout and stderr that exist and never fail on a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_WRONLY), "w", closefd=False))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        elif hasattr(stream, "buffer"):
            import io
            setattr(sys, name, io.TextIOWrapper(stream.buffer, stream.encoding,
                                                "backslashreplace", line_buffering=True))


def main(argv=None):
    """The command line. Returns the exit status."""
    import errno
    prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    if sys.version_info < (3, 7):       # without a locale it reads argv as ASCII
        argv = [os.fsencode(word).decode("utf-8", "surrogateescape") for word in argv]
    try:
        status = execute(argv)
        sys.stdout.flush()
        return status
    except SystemExit as ended:         # argparse, after its help
        return ended.code or 0
    except KeyboardInterrupt as stopped:
        name, code = ("SIGTERM", 143) if isinstance(stopped, Terminated) else ("Ctrl-C", 130)
        id = getattr(stopped, "id", None)
        told = f"run {id} is stored" if id else "it may be stored"
        failure = Stopped(f"stopped by {name}" + (
            f"; {told}: the same command again makes no second run" if "create" in argv else ""))
        failure.exit_code, failure.id = code, id
    except OSError as error:
        drop_stdout()
        if error.errno in (errno.EPIPE, errno.EINVAL):
            return 0        # whoever read the output has what they wanted
        failure = Error(f"cannot write: {error}", "make room, or check the path")
        failure.id = getattr(error, "id", None)
    except Error as error:
        failure = error
    except Exception as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        failure = Error(f"unexpected {type(error).__name__}: {error} (line {trace.tb_lineno})",
                        f"this is a bug: report it with the output of {PROG} --version")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if failure.id and failure.id not in failure.message:
        failure.message += f"\nrun {failure.id} is stored"
    with contextlib.suppress(OSError, ValueError):
        as_json = re.search(r"(?i)--json\b|--format[= ]json\b", " ".join(argv))
        sys.stderr.write((dump_json(failure.as_json()) if as_json else failure.as_text()) + "\n")
        sys.stderr.flush()
    return failure.exit_code


# ---- guard ---------------------------------------------------------------------------------------

if __name__ == "__main__":
    end = main()
    if "threading" in sys.modules and sys.modules["threading"].active_count() > 1:
        os._exit(end)       # a thread still waits for a server or for DNS
    sys.exit(end)
