#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tests of tofupilot_runs, and the sandbox that they run against.

TofuPilot is a service that keeps the test runs of hardware factories, https://www.tofupilot.com.
This file needs nothing but Python 3.6 or newer. It has three rooms:

SANDBOX   a strict local server that behaves like the TofuPilot v2 REST API for runs and
          attachments. It can be read to learn the API.
TESTS     of the script: each class says what it holds, each test promises one behaviour.
TOOLS     random kills and faults, the demonstration, the measurements, and the command line.

    python3 test_tofupilot_runs.py                  the tests, a process for each class of them
    python3 test_tofupilot_runs.py test CLASS ...   some of them
    python3 test_tofupilot_runs.py serve --help     the sandbox, until Ctrl-C
    python3 test_tofupilot_runs.py demo             each subcommand against a sandbox
    python3 test_tofupilot_runs.py trials --help    random kills and faults, 10,000 of them
    python3 test_tofupilot_runs.py bench            the figures of the README
"""
import _thread
import argparse
import ast
import atexit
import base64
import collections
import contextlib
import csv
import datetime
import doctest
import errno
import functools
import glob
import hashlib
import heapq
import hmac
import http.client
import importlib
import io
import itertools
import json
import math
import multiprocessing.pool
import ntpath
import os
import platform
import py_compile
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import tokenize
import traceback
import unittest
import uuid
import warnings
import zipfile
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlsplit
from unittest import mock
from urllib.request import ProxyHandler, Request as WebRequest, build_opener, urlopen


# ==== SANDBOX =====================================================================================
#
# A strict local server that answers as the TofuPilot v2 REST API does for runs and attachments.
# It keeps its data in one SQLite database. Four rooms: schema holds the fields of each operation,
# their checks, and the form in which get shows them; store holds the data and what each operation
# does; http holds routes, order of the checks, error bodies, the storage behind signed URLs, and
# faults; serve holds the command line.

# ---- schema --------------------------------------------------------------------------------------
#
# A kind is a function kind(check, path, value). It returns the value in the form that the store
# keeps, and tells check.fail what is wrong. A row (name, kind, rule) describes a field of an
# object: rule R is required, O optional, N optional or null, X forbidden. Times and durations
# become whole milliseconds.

RUN_OUTCOMES = ("PASS", "FAIL", "ERROR", "TIMEOUT", "ABORTED")
MAX_KEYS = 50               # of the metadata of a run or a unit
MAX_FILTER_KEYS = 5
MAX_VALUE = 50000           # characters of a metadata value
MAX_MESSAGE = 10000         # characters of a log message; the rest is cut off
MAX_SOURCE_FILE = 200       # characters of a log's source file; its end is kept
SAFE_INTEGER = 2 ** 53 - 1  # the largest that JavaScript holds exactly
DEFAULT_REVISION = "A"
EPOCH = datetime.datetime(1970, 1, 1)
MILLISECOND = datetime.timedelta(milliseconds=1)

IDENTIFIER_PATTERN = re.compile(r"[a-zA-Z0-9_.:+-]{1,60}")
KEY_PATTERN = re.compile(r"[a-zA-Z0-9_.:+-]{1,40}")
UUID_PATTERN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)
DECIMAL_PATTERN = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.I)
RADIX_PATTERN = re.compile(r"0(x[0-9a-f]+|o[0-7]+|b[01]+)", re.I)
TIME_PATTERN = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d)(?::(\d\d)(?:\.(\d+))?)?"
    r"(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))", re.A)
DURATION_PATTERN = re.compile(
    r"P(?:(\d+)W|(?!.*W)(?=\d|T\d)(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)D)?"
    r"(?:T(?=\d)(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:[.,]\d+)?)S)?)?)", re.A)
DURATION_UNITS = (604800, 31536000, 2592000, 86400, 3600, 60, 1)    # a month has 30 days


def parse_time(text):
    """'1970-01-01T01:00:01.2345+01:00' -> 1234: cut to milliseconds, as JavaScript does."""
    match = TIME_PATTERN.fullmatch(text)
    *date, fraction, sign, hours, minutes = match.groups(default="0")
    local = datetime.datetime(*map(int, date))
    offset = datetime.timedelta(hours=int(hours), minutes=int(minutes))
    utc = local + offset if sign == "-" else local - offset
    milliseconds = fraction[:3].ljust(3, "0")
    return (utc - EPOCH) // MILLISECOND + int(milliseconds)


def parse_duration(text):
    """'PT2M30.5S' -> 150500."""
    seconds = 0
    parts = DURATION_PATTERN.fullmatch(text).groups(default="0")
    for part, unit in zip(parts, DURATION_UNITS):
        seconds += float(part.replace(",", ".")) * unit
    return min(SAFE_INTEGER, round(1000 * seconds))


def show_time(milliseconds):
    """1234 -> '1970-01-01T00:00:01.234Z'; None stays None."""
    if milliseconds is None:
        return None
    moment = EPOCH + milliseconds * MILLISECOND
    return moment.isoformat(timespec="milliseconds") + "Z"


def show_duration(milliseconds):
    """150000 -> 'PT2M30S'; 0 -> 'PT0S'."""
    minutes, rest = divmod(milliseconds, 60000)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    date = f"P{days}D" if days else "P"
    clock = ""
    if hours:
        clock += f"{hours}H"
    if minutes:
        clock += f"{minutes}M"
    if rest or milliseconds == 0:
        clock += f"{rest / 1000:g}S"
    return f"{date}T{clock}" if clock else date


def show_span(thing):
    """Start, end and duration of a run, a phase or a sequence."""
    started_at = thing.get("started_at")
    ended_at = thing.get("ended_at")
    duration = None
    if started_at is not None and ended_at is not None:
        duration = show_duration(ended_at - started_at)
    return {
        "started_at": show_time(started_at),
        "ended_at": show_time(ended_at),
        "duration": duration}


def js_number(value):
    """What JavaScript's Number() makes of a text: '' is 0, '0x10' is 16; no number: as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text:
        return 0
    if RADIX_PATTERN.fullmatch(text):
        return int(text, 0)
    if DECIMAL_PATTERN.fullmatch(text):
        return float(text)
    return value


def read_json_integer(digits):
    """SQLite stores integers of 64 bits; larger ones become floats."""
    return int(digits) if len(digits) < 19 else float(digits)


def load_json(text):
    """json.loads that refuses NaN, Infinity and half of a surrogate pair by ValueError."""
    value = json.loads(text, parse_constant=int, parse_int=read_json_integer)   # int("NaN") raises
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def type_name(value):
    """'string', 'number' or 'boolean'; None for anything else, also for NaN and the infinities."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, (int, float)) and math.isfinite(value):
        return "number"
    return None


def is_list_of(name, value):
    """Whether value is a list of which each element has this type_name."""
    return isinstance(value, list) and all(type_name(element) == name for element in value)


class Check:
    """Collects the issues of a request; knows(table, id) tells whether the store has a row."""

    def __init__(self, knows):
        self.knows = knows
        self.issues = []

    def fail(self, path, code, problem):
        """Adds an issue. Its message names the field as phases[0].name or serial number."""
        name = ""
        for part in path:
            name += f"[{part}]" if isinstance(part, int) else f".{part}"
        name = re.sub("^([a-z]+)_number$", r"\1 number", name.lstrip("."))
        self.issues.append({"code": code, "path": list(path), "message": f"{name} {problem}"})


def kind(parse, problem, code="invalid_type"):
    """The kind whose values parse(value) makes; where that fails or is None, it is refused."""
    def checked(check, path, value):
        try:
            clean = parse(value)
        except (ValueError, TypeError, AttributeError, OverflowError):
            clean = None
        if clean is None:
            check.fail(path, code, problem)
        return clean
    return checked


def only(holds, problem, code="invalid_type"):
    """The kind of the values for which holds(value) is true."""
    def parse(value):
        return value if holds(value) else None
    return kind(parse, problem, code)


def is_text(value):
    """Whether it is a string."""
    return isinstance(value, str)


def is_text_or_texts(value):
    """Whether it is a string or a list of strings."""
    return isinstance(value, str) or is_list_of("string", value)


def is_file_name(value):
    """Whether it has the length of a file's name."""
    return isinstance(value, str) and 1 <= len(value) <= 255


def is_metadata_value(value):
    """Whether it is a scalar that is not too long."""
    return type_name(value) is not None and len(str(value)) <= MAX_VALUE


def parse_identifier(value):
    """' SN-1 ' -> 'SN-1'."""
    return IDENTIFIER_PATTERN.fullmatch(value.strip()).group()


TEXT = only(is_text, "must be a string")
TEXT_OR_TEXTS = only(is_text_or_texts, "must be text or texts")
FILLED = only(str.strip, "is Too small: at least 1 character is needed", "too_small")
FILE_NAME = only(is_file_name, "must be 1 to 255 characters", "too_big")
IDENTIFIER = kind(
    parse_identifier, "must be 1 to 60 characters of a-z A-Z 0-9 _ . : + -", "invalid_format")
ANY_CASE = kind(str.lower, "must be a string")      # names are matched in any case
NUMBER = only(lambda value: type_name(value) == "number", "must be a finite number")
BOOLEAN = only(lambda value: isinstance(value, bool), "must be a boolean")
QUERY_BOOLEAN = kind(
    {"true": True, "1": True, "false": False, "0": False}.get, "must be a boolean")
SCALAR = only(type_name, "must be a string, a finite number or a boolean")
METADATA_VALUE = only(
    is_metadata_value,
    f"must be text of at most {MAX_VALUE} characters, a finite number or a boolean")
ANY_JSON = only(lambda value: json.dumps(value, allow_nan=False), "must hold finite numbers only")
DATETIME = kind(parse_time, "must be an ISO 8601 datetime with an offset", "invalid_format")
DURATION = kind(parse_duration, "must be an ISO 8601 duration", "invalid_format")


def enum(*words):
    """The kind of a text that is one of the words."""
    problem = "must be one of " + ", ".join(words)
    return only(lambda value: value in words, problem, "invalid_value")


def integer(least=-SAFE_INTEGER, most=SAFE_INTEGER, read=None):
    """The kind of an integer; 5.0 is one too. read(value) is applied first, if it is given."""
    def parse(value):
        number = value if read is None else read(value)
        if type_name(number) != "number" or int(number) != number:
            return None
        return int(number) if least <= number <= most else None
    return kind(parse, f"must be an integer from {least} to {most}")


def uuid_of(table):
    """The kind of a UUID in any case, or of an ID that the table has, such as proc_abc."""
    def checked(check, path, value):
        if isinstance(value, str):
            if UUID_PATTERN.fullmatch(value):
                return value.lower()
            if check.knows(table, value):
                return value
        check.fail(path, "invalid_format", "must be a valid UUID")
        return value
    return checked


def array(item):
    """The kind of a list whose elements have the kind item."""
    def checked(check, path, value):
        if not isinstance(value, list):
            check.fail(path, "invalid_type", "must be an array")
            return []
        return [item(check, path + (i,), element) for i, element in enumerate(value)]
    return checked


def many(item):
    """An array in a query: one value arrives as its text, only a repeated one as a list."""
    listed = array(item)

    def checked(check, path, value):
        values = [value] if isinstance(value, str) else value
        return listed(check, path, values)
    return checked


def presence_problem(thing, name, rule):
    """(code, problem) where a field must not be absent, sent or null; None where all is well."""
    if name not in thing:
        return ("invalid_type", "is required") if rule == "R" else None
    if rule == "X":
        return "unrecognized_keys", "must not be sent"
    if thing[name] is None and rule != "N":
        return "invalid_type", "must not be null"
    return None


def record(*fields):
    """The kind of an object. Other fields are ignored; absent and null ones are left out."""
    def checked(check, path, value):
        if not isinstance(value, dict):
            check.fail(path, "invalid_type", "must be an object")
            return {}
        clean = {}
        for name, field, rule in fields:
            here = path + (name,)
            problem = presence_problem(value, name, rule)
            if problem:
                check.fail(here, *problem)
            elif value.get(name) is not None:
                clean[name] = field(check, here, value[name])
        check_order(check, path, clean)
        return clean
    return checked


def check_order(check, path, clean):
    """Nothing ends before it has started."""
    started_at = clean.get("started_at")
    ended_at = clean.get("ended_at")
    if started_at is not None and ended_at is not None and ended_at < started_at:
        check.fail(path + ("ended_at",), "custom", "must not be before started_at")


def metadata(deletes=False):
    """The kind of custom keys and values. deletes=True: a null stands for "delete this key"."""
    def checked(check, path, value):
        if not isinstance(value, dict) or len(value) > MAX_KEYS:
            check.fail(path, "too_big", f"must be an object of at most {MAX_KEYS} keys")
            return {}
        for key in value:
            here = path + (key,)
            if not KEY_PATTERN.fullmatch(key):
                problem = "must be a key of 1 to 40 characters of a-z A-Z 0-9 _ . : + -"
                check.fail(here, "invalid_key", problem)
            if value[key] is not None or not deletes:
                METADATA_VALUE(check, here, value[key])
        return value
    return checked


OPERATORS = {   # of the metadata filter: (operator, type of its value) -> SQL
    ("in", "list"): "value IN ({})",
    ("contains", "string"): "instr(lower(value), lower(?)) > 0",
    ("gte", "number"): "value >= ?",
    ("lte", "number"): "value <= ?",
    ("gt", "number"): "value > ?",
    ("lt", "number"): "value < ?",
    ("eq", "number"): "value = ?",
    ("eq", "boolean"): "value = ?"}


def filter_tests(operators):
    """{"gte": 1} -> ("number", [("value >= ?", [1])]); None where a part is unknown."""
    if not isinstance(operators, dict):
        return None
    types = set()
    tests = []
    for name, value in operators.items():
        is_list = is_list_of("string", value)
        sql = OPERATORS.get((name, "list" if is_list else type_name(value)))
        if sql is None:
            return None
        types.add("string" if is_list else type_name(value))
        tests.append((sql, value if is_list else [value]))
    if len(types) != 1:
        return None
    return types.pop(), tests


def metadata_filter(check, path, text):
    """The kind of '{"shift": {"in": ["A"]}}' -> [(key, type, [(SQL, values)])]."""
    try:
        wanted = load_json(text or "{}")    # the official SDK sends an empty text for no filter
    except (TypeError, ValueError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict) or len(wanted) > MAX_FILTER_KEYS:
        problem = f"must be a JSON object of at most {MAX_FILTER_KEYS} keys"
        check.fail(path, "custom", problem)
        return []
    clean = []
    for key, operators in wanted.items():
        found = filter_tests(operators)
        if found:
            clean.append((key,) + found)
        else:
            problem = 'must have operators of one type, such as {"in": ["A"]} or {"gte": 1}'
            check.fail(path + (key,), "invalid_type", problem)
    return clean


# The body of create.

RUN_OUTCOME = enum(*RUN_OUTCOMES)
VERDICT = enum("PASS", "FAIL", "UNSET")
VALIDATORS = array(record(
    ("outcome", VERDICT, "N"),
    ("operator", TEXT, "N"),
    ("expected_value", ANY_JSON, "N"),
    ("expression", TEXT, "N"),
    ("is_decisive", BOOLEAN, "N")))
AGGREGATIONS = array(record(
    ("type", TEXT, "R"),
    ("outcome", VERDICT, "N"),
    ("value", SCALAR, "N"),
    ("unit", TEXT, "N"),
    ("validators", VALIDATORS, "N")))
AXIS = record(
    ("data", array(NUMBER), "R"),
    ("units", TEXT, "N"),
    ("name", TEXT, "N"),
    ("description", TEXT, "N"),
    ("validators", VALIDATORS, "N"),
    ("aggregations", AGGREGATIONS, "N"))
MEASUREMENT = record(
    ("name", TEXT, "R"),
    ("outcome", VERDICT, "R"),
    ("measured_value", ANY_JSON, "N"),
    ("units", TEXT_OR_TEXTS, "N"),
    ("x_axis", AXIS, "N"),
    ("y_axis", array(AXIS), "N"),
    ("lower_limit", NUMBER, "O"),
    ("upper_limit", NUMBER, "O"),
    ("docstring", TEXT, "N"),
    ("validators", VALIDATORS, "N"),
    ("aggregations", AGGREGATIONS, "N"))
PHASE = record(
    ("name", TEXT, "R"),
    ("outcome", enum("PASS", "FAIL", "SKIP", "ERROR"), "R"),
    ("started_at", DATETIME, "R"),
    ("ended_at", DATETIME, "R"),
    ("docstring", TEXT, "N"),
    ("measurements", array(MEASUREMENT), "N"),
    ("retry_count", integer(0), "O"),
    ("sequence_path", TEXT, "N"))
SEQUENCE = record(
    ("path", FILLED, "R"),
    ("name", TEXT, "R"),
    ("outcome", enum(*RUN_OUTCOMES, "SKIP"), "R"),
    ("source", TEXT, "N"),
    ("started_at", DATETIME, "N"),
    ("ended_at", DATETIME, "N"))
LOG_ENTRY = record(
    ("level", enum("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "R"),
    ("timestamp", DATETIME, "R"),
    ("message", TEXT, "R"),
    ("source_file", TEXT, "R"),
    ("line_number", integer(), "R"))
VARIABLE_SOURCE = enum(
    "default", "shell", "dotenv", "process", "station", "procedure", "organization")
VARIABLE = (
    ("key", TEXT, "R"),
    ("variable_id", TEXT, "N"),
    ("version", integer(), "N"),
    ("source", VARIABLE_SOURCE, "N"))
CREATE_RULES = (
    ("outcome", RUN_OUTCOME, "R"),
    ("procedure_id", uuid_of("procedures"), "R"),
    ("started_at", DATETIME, "R"),
    ("ended_at", DATETIME, "R"),
    ("serial_number", IDENTIFIER, "R"),
    ("deployment_id", TEXT, "N"),
    ("client_run_ref", FILLED, "O"),
    ("execution_id", TEXT, "N"),
    ("slot_key", TEXT, "N"),
    ("slot_name", TEXT, "N"),
    ("procedure_version", IDENTIFIER, "N"),
    ("operated_by", FILLED, "O"),
    ("part_number", IDENTIFIER, "O"),
    ("revision_number", IDENTIFIER, "O"),
    ("batch_number", IDENTIFIER, "O"),
    ("sub_units", array(IDENTIFIER), "O"),
    ("docstring", TEXT, "O"),
    ("phases", array(PHASE), "O"),
    ("sequences", array(SEQUENCE), "N"),
    ("logs", array(LOG_ENTRY), "O"),
    ("metadata", metadata(), "O"),
    ("unit_metadata", metadata(), "O"),
    ("config", array(record(("value", SCALAR, "R"), *VARIABLE)), "O"),
    ("secrets", array(record(("value", SCALAR, "X"), *VARIABLE)), "O"))


def check_across_fields(check, run):
    """The rules of create that concern several fields; run is what the kinds made of the body."""
    for name, needed in (("slot_key", "execution_id"), ("slot_name", "slot_key")):
        if name in run and needed not in run:
            check.fail((name,), "custom", f"requires {needed}")
    paths = []
    for sequence in run.get("sequences", ()):
        paths.append(sequence.get("path") or "")
    for i, path in enumerate(paths):
        parent = path.rpartition("/")[0]
        lacks_parent = "/" in path and parent not in paths
        if lacks_parent or path in paths[:i]:
            check.fail(("sequences", i, "path"), "custom", "is there twice, or lacks its parent")
    for i, phase in enumerate(run.get("phases", ())):
        path = phase.get("sequence_path")
        if path is not None and path not in paths:
            check.fail(("phases", i, "sequence_path"), "custom", "must name a path of sequences")


# The query of list.

SEARCH = "(instr(unit.key, lower(?)) > 0 OR substr(run.id, 1, length(?)) = lower(?))"
DURATION_SQL = "run.ended_at - run.started_at"
FILTERS = (     # parameter, kind, its SQL: of a list the column that is IN it
    ("search_query", TEXT, SEARCH),
    ("ids", many(uuid_of("runs")), "run.id"),
    ("outcomes", many(RUN_OUTCOME), "run.outcome"),
    ("procedure_ids", many(uuid_of("procedures")), "run.procedure_id"),
    ("procedure_versions", many(ANY_CASE), "version.key"),
    ("deployment_ids", many(uuid_of("deployments")), "run.deployment_id"),
    ("environments", many(enum("production", "preview", "development")), "deployment.environment"),
    ("execution_ids", many(TEXT), "run.execution_id"),
    ("slot_keys", many(TEXT), "run.slot_key"),
    ("slot_names", many(TEXT), "run.slot_name"),
    ("serial_numbers", many(ANY_CASE), "unit.key"),
    ("part_numbers", many(ANY_CASE), "part.key"),
    ("revision_numbers", many(ANY_CASE), "revision.key"),
    ("batch_numbers", many(ANY_CASE), "batch.key"),
    ("samples", many(enum("production", "golden", "failing", "ignored")),
     "coalesce(unit.sample, 'production')"),
    ("duration_min", DURATION, DURATION_SQL + " >= ?"),
    ("duration_max", DURATION, DURATION_SQL + " <= ?"),
    ("started_after", DATETIME, "run.started_at >= ?"),
    ("started_before", DATETIME, "run.started_at <= ?"),
    ("ended_after", DATETIME, "run.ended_at >= ?"),
    ("ended_before", DATETIME, "run.ended_at <= ?"),
    ("created_after", DATETIME, "run.created_at >= ?"),
    ("created_before", DATETIME, "run.created_at <= ?"),
    ("created_by_user_ids", many(uuid_of("accounts")), "run.user_id"),
    ("created_by_station_ids", many(uuid_of("accounts")), "run.station_id"),
    ("operated_by_ids", many(uuid_of("accounts")), "run.operator_id"),
    ("operated_by_names", many(TEXT), "coalesce(operator.name, run.operator_name)"))
SORTS = {
    "started_at": "run.started_at",
    "created_at": "run.created_at",
    "outcome": "run.outcome",
    "duration": DURATION_SQL,
    "serial_number": "unit.key",
    "part_number": "part.key",
    "revision_number": "revision.key"}
LIST = tuple((name, field, "O") for name, field, _ in FILTERS) + (
    ("limit", integer(1, 100, js_number), "O"),
    ("cursor", integer(0, read=js_number), "O"),
    ("sort_by", enum(*SORTS), "O"),
    ("sort_order", enum("asc", "desc"), "O"),
    ("metadata", metadata_filter, "O"),
    ("include_metadata", QUERY_BOOLEAN, "O"),
    ("include_sequences", QUERY_BOOLEAN, "O"))


# The answer of get: what create took, in the form in which get gives it back.

def new_id():
    """A random UUID."""
    return str(uuid.uuid4())


def pick(thing, *names):
    """These keys of a dict; None for those that it lacks."""
    return {name: thing.get(name) for name in names}


def is_comparable(value):
    """Whether an expected value is kept as it is: no object, no list of several types."""
    if value is None or type_name(value) is not None:
        return True
    return is_list_of("number", value) or is_list_of("string", value)


def generated_expression(operator, value):
    """('>=', 3) -> 'x >= 3.0'; None where a validator has neither an operator nor a value."""
    if operator is None and value is None:
        return None
    if type_name(value) == "number":
        value = float(value)
    elif is_list_of("number", value):
        value = [float(element) for element in value]
    text = "" if value is None else repr(value)
    return f"x {operator or '=='} {text}".strip()


def show_validator(validator):
    """Operator and value make an expression, unless the value is an object or a mixed list."""
    operator = validator.get("operator")
    value = validator.get("expected_value")
    custom = validator.get("expression")
    if is_comparable(value):
        generated = generated_expression(operator, value)
    else:
        custom = custom or json.dumps(value, separators=(",", ":"))
        operator = value = generated = None
    expression = custom
    if custom is None:
        expression = generated or ""
    return {
        "outcome": validator.get("outcome", "UNSET"),
        "operator": operator,
        "expected_value": value,
        "expression": expression,
        "is_decisive": validator.get("is_decisive", True),
        "is_expression_only": generated is None,
        "analytics_expression": generated,
        "has_custom_expression": generated is not None and custom is not None}


def limit_validators(measurement):
    """The deprecated limits as validators; a number decides their outcome."""
    validators = []
    value = measurement.get("measured_value")
    for name, operator in (("lower_limit", ">="), ("upper_limit", "<=")):
        limit = measurement.get(name)
        if limit is None:
            continue
        outcome = "UNSET"
        if type_name(value) == "number":
            holds = value >= limit if operator == ">=" else value <= limit
            outcome = "PASS" if holds else "FAIL"
        validators.append({"operator": operator, "expected_value": limit, "outcome": outcome})
    return validators


def show_validators(owner):
    """The validators of a measurement, an axis or an aggregation, its limits first; or None."""
    validators = limit_validators(owner) + owner.get("validators", [])
    return [show_validator(validator) for validator in validators] or None


def show_aggregation(aggregation):
    """An aggregation with its ID."""
    shown = pick(aggregation, "type", "outcome", "value", "unit")
    return dict(shown, id=new_id(), validators=show_validators(aggregation))


def show_checks(owner):
    """Validators and aggregations of a measurement or an axis."""
    aggregations = [show_aggregation(each) for each in owner.get("aggregations", ())]
    return {"validators": show_validators(owner), "aggregations": aggregations or None}


def legacy_axes(value, units):
    """The columns of [[x, y], ...] as axes; no axes where the value has another form."""
    if not isinstance(value, list) or not all(is_list_of("number", row) for row in value):
        return []
    if len({len(row) for row in value}) != 1:
        return []
    names = units if isinstance(units, list) else [units]
    axes = []
    for column, name in itertools.zip_longest(zip(*value), names[:len(value[0])]):
        axes.append({"data": list(column), "units": name})
    return axes


def show_axis(axis):
    """An axis as an element of data_series."""
    shown = pick(axis, "data", "units", "name", "description")
    return dict(shown, **show_checks(axis))


def show_measurement(measurement):
    """Several dimensions come as data_series, any other value as measured_value and units."""
    shown = pick(measurement, "name", "outcome")
    shown.update(show_checks(measurement), id=new_id())
    value = measurement.get("measured_value")
    units = measurement.get("units")
    axes = []
    if "x_axis" in measurement:
        axes.append(measurement["x_axis"])
    axes += measurement.get("y_axis", [])
    if not axes:
        axes = legacy_axes(value, units)
    if axes:
        return dict(shown, data_series=[show_axis(axis) for axis in axes])
    if isinstance(units, list):
        units = ", ".join(units)
    return dict(shown, units=units, measured_value=value)


def show_phase(phase):
    """A phase with its ID, its duration and its measurements."""
    shown = pick(phase, "name", "outcome", "sequence_path", "docstring")
    measurements = [show_measurement(each) for each in phase.get("measurements", ())]
    shown.update(show_span(phase), id=new_id(), measurements=measurements,
                 retry_count=phase.get("retry_count", 0))
    return shown


def show_sequence(sequence):
    """A sequence with its ID; "a/b" has the parent "a" and the key "b"."""
    parent, _, key = sequence["path"].rpartition("/")
    shown = pick(sequence, "path", "name", "source", "outcome")
    shown.update(show_span(sequence), id=new_id(), key=key, parent_path=parent or None)
    return shown


def show_log(log):
    """Texts that are too long or empty are repaired; of a path the end says most."""
    return {
        "id": new_id(),
        "level": log["level"],
        "timestamp": show_time(log["timestamp"]),
        "message": log["message"][:MAX_MESSAGE] or "(empty)",
        "source_file": log["source_file"][-MAX_SOURCE_FILE:] or "unknown",
        "line_number": log["line_number"]}


def phase_order(phase):
    """Phases by start, name and attempt."""
    return phase["started_at"], phase["name"], phase.get("retry_count", 0)


def sequence_order(sequence):
    """Parents before nested calls, each level by its start; skipped calls have none."""
    return sequence["path"].count("/"), sequence.get("started_at", SAFE_INTEGER)


def log_order(log):
    """Logs by time; those of one time keep their order."""
    return log["timestamp"]


def show_details(run):
    """What get shows beyond the row of a list and what never changes."""
    variable = ("key", "variable_id", "version", "source")
    phases = sorted(run.get("phases", ()), key=phase_order)
    sequences = sorted(run.get("sequences", ()), key=sequence_order)
    logs = sorted(run.get("logs", ()), key=log_order)
    return {
        "config": [pick(entry, "value", *variable) for entry in run.get("config", ())],
        "secrets": [pick(entry, *variable) for entry in run.get("secrets", ())],
        "phases": [show_phase(phase) for phase in phases],
        "sequences": [show_sequence(sequence) for sequence in sequences],
        "logs": [show_log(log) for log in logs]}


# ---- store ---------------------------------------------------------------------------------------
#
# A number (of a part, revision, batch or version) and a serial number have a `key`: the same in
# lower case, by which they are found in any case. Uploads hold what their object is (object_size,
# object_type) and, from finalize on, what the run shows of it (size, content_type).

TABLES = (
    "CREATE TABLE settings (name PRIMARY KEY, value)",
    "CREATE TABLE accounts (id PRIMARY KEY, type, name, email, role, key UNIQUE)",
    "CREATE TABLE procedures (id PRIMARY KEY, name, linked)",
    "CREATE TABLE deployments (id PRIMARY KEY, procedure_id, environment)",
    """CREATE TABLE numbers (id PRIMARY KEY, kind, scope, key, number,
        UNIQUE (key, kind, scope))""",
    "CREATE TABLE units (id PRIMARY KEY, number, key UNIQUE, part_id, sample, parent_id, metadata)",
    """CREATE TABLE runs (n INTEGER PRIMARY KEY, id UNIQUE, created_at, started_at, ended_at,
        outcome, procedure_id, version_id, deployment_id, unit_id, part_id, revision_id, batch_id,
        execution_id, slot_key, slot_name, docstring, user_id, station_id, operator_id,
        operator_name, client_run_ref UNIQUE, digest, details, UNIQUE (execution_id, slot_key))""",
    "CREATE INDEX runs_started ON runs (started_at, n, procedure_id)",
    "CREATE INDEX runs_created ON runs (created_at, n, procedure_id)",
    "CREATE INDEX runs_unit ON runs (unit_id)",
    "CREATE INDEX runs_part ON runs (part_id)",
    "CREATE TABLE metadata (run_n, key, type, value, PRIMARY KEY (run_n, key))",
    "CREATE TABLE sub_units (run_n, unit_id, PRIMARY KEY (run_n, unit_id))",
    """CREATE TABLE uploads (id PRIMARY KEY, name, run_n, place, object_size, object_type, size,
        content_type)""",
    "CREATE INDEX uploads_run ON uploads (run_n, place)")
JOINS = {   # alias -> table; it is joined by run.<alias>_id
    "procedure": "procedures",
    "unit": "units",
    "part": "numbers",
    "revision": "numbers",
    "batch": "numbers",
    "version": "numbers",
    "deployment": "deployments",
    "user": "accounts",
    "station": "accounts",
    "operator": "accounts"}
ROW = """run.*, procedure.name AS procedure_name, version.number AS tag, unit.sample,
    unit.number AS serial_number, part.number AS part_number, revision.number AS revision_number,
    batch.number AS batch_number, user.name AS user_name, user.email AS user_email,
    station.name AS station_name, operator.email AS operator_email,
    coalesce(operator.name, run.operator_name) AS operated_by"""
SUB_UNITS = """SELECT unit.id, unit.number AS serial_number, part.number AS part_number,
        part.number AS part_name
    FROM sub_units JOIN units unit ON unit.id = unit_id JOIN numbers part ON part.id = part_id
    WHERE run_n = ? ORDER BY sub_units.rowid"""
DOWNLOAD_LIFE = 3600    # seconds


class Refused(Exception):
    """An error answer: HTTP status, message, issues of a validation, code."""

    def __init__(self, status, message=None, issues=None, code=None):
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.issues = issues
        self.code = code


def marks(values):
    """'?, ?, ?' for three values."""
    return ", ".join("?" * len(values))


def named(id, **fields):
    """{"id": id, ...}; None where there is no ID."""
    return dict(id=id, **fields) if id else None


def select_runs(columns, where, rest=""):
    """A query of runs, with joins for those aliases that it mentions."""
    conditions = f"WHERE {where} {rest}"
    sql = f"SELECT {columns} FROM runs run"
    for alias, table in JOINS.items():
        if f"{alias}." in columns or f"{alias}." in conditions:
            sql += f" LEFT JOIN {table} {alias} ON {alias}.id = run.{alias}_id"
    return f"{sql} {conditions}"


def show_row(row):
    """A run as list and get show it; metadata and sequences come on request."""
    version = named(row["version_id"], tag=row["tag"])
    part = named(row["part_id"], number=row["part_number"], name=row["part_number"])
    part["revision"] = named(row["revision_id"], number=row["revision_number"])
    batch = named(row["batch_id"], number=row["batch_number"])
    operator = None
    if row["operated_by"]:
        operator = {"id": row["operator_id"], "name": row["operated_by"],
                    "email": row["operator_email"]}
    shown = pick(row, "id", "outcome", "execution_id", "slot_key", "slot_name", "docstring")
    shown.update(
        show_span(row),
        created_at=show_time(row["created_at"]),
        procedure=named(row["procedure_id"], name=row["procedure_name"], version=version),
        unit=named(row["unit_id"], serial_number=row["serial_number"], sample=row["sample"],
                   part=part, batch=batch),
        created_by_user=named(row["user_id"], name=row["user_name"], email=row["user_email"]),
        created_by_station=named(row["station_id"], name=row["station_name"]),
        operated_by=operator)
    return shown


def row_as_dict(cursor, row):
    """The row_factory: {column: value}."""
    names = [column[0] for column in cursor.description]
    return dict(zip(names, row))


class Store:
    """The organization's data. Each operation takes the caller and its checked input.

    path        database file; uploaded files go to path + ".files". None: memory and a temp folder
    upload_ttl  seconds that an upload URL lives
    knows_ref   False: a server before API 2.19, which ignores client_run_ref and lacks whoami
    patch       whether PATCH of a run's attachments does "append" or "replace"
    clock       a function: the server's time, in seconds since 1970
    origin      what the URLs of the storage begin with
    """

    def __init__(self, path=None, upload_ttl=60, knows_ref=True, patch="append"):
        self.path = path
        self.upload_ttl = upload_ttl
        self.knows_ref = knows_ref
        self.patch = patch
        self.clock = time.time
        self.origin = ""
        self.folder = None
        self.lock = threading.RLock()
        name = path or ":memory:"
        self.db = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
        self.db.row_factory = row_as_dict
        try:
            self.db.execute("PRAGMA synchronous = OFF")     # kept over a kill, not over a power cut
            if not self.one("SELECT 1 FROM sqlite_master WHERE name = 'settings'"):
                self.transaction(self.make)
            rows = self.all("SELECT * FROM settings")
        except sqlite3.Error:
            self.close()
            raise
        self.settings = {row["name"]: row["value"] for row in rows}
        self.folder = path + ".files" if path else tempfile.mkdtemp("", "sandbox")
        os.makedirs(self.folder, exist_ok=True)

    def close(self):
        """Closes the database. What was kept in memory and in a temp folder is gone."""
        self.db.close()
        if self.folder and not self.path:
            shutil.rmtree(self.folder, ignore_errors=True)

    def make(self):
        """Tables, and an organization: three users, a station, three procedures, a unit."""
        for sql in TABLES:
            self.db.execute(sql)
        made = {"operator": "otto@sandbox.example"}
        for name in ("user", "viewer", "operator", "station", "organization", "procedure",
                     "unlinked_procedure", "deployment"):
            made[f"{name}_id"] = new_id()
        for name in ("user", "viewer", "station", "storage"):
            made[f"{name}_key"] = f"sandbox_{name}_{uuid.uuid4().hex}"
        for name, value in made.items():
            self.add("settings", name=name, value=value)
        self.add("accounts", type="user", id=made["user_id"], key=made["user_key"],
                 name="Ada Example", email="ada@sandbox.example", role="member")
        self.add("accounts", type="user", id=made["viewer_id"], key=made["viewer_key"],
                 name="Vera Example", email="vera@sandbox.example", role="viewer")
        self.add("accounts", type="user", id=made["operator_id"],
                 name="Otto Example", email=made["operator"], role="member")
        self.add("accounts", type="station", id=made["station_id"], key=made["station_key"],
                 name="Station 4")
        self.add("procedures", id=made["procedure_id"], name="Functional test", linked=1)
        self.add("procedures", id="proc_abc", name="Burn-in", linked=1)
        self.add("procedures", id=made["unlinked_procedure_id"], name="Calibration", linked=0)
        self.add("deployments", id=made["deployment_id"], procedure_id=made["procedure_id"],
                 environment="production")
        self.put_unit({"serial_number": "PSU-0001"})    # to be a sub-unit at once

    # Access to the database

    def all(self, sql, *values):
        """All rows of a query, as dicts."""
        return self.db.execute(sql, values).fetchall()

    def one(self, sql, *values):
        """The first row of a query, or None."""
        return self.db.execute(sql, values).fetchone()

    def add(self, table, **columns):
        """Inserts a row. Returns its rowid."""
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks(columns)})"
        return self.db.execute(sql, tuple(columns.values())).lastrowid

    def transaction(self, operation, *arguments):
        """Runs operation(*arguments) alone: all of it happens or nothing."""
        with self.lock, self.db:
            self.db.execute("BEGIN")
            return operation(*arguments)

    def knows(self, table, id):
        """Whether the table has a row of this ID."""
        return self.one(f"SELECT 1 FROM {table} WHERE id = ?", id) is not None

    def account(self, key):
        """Whose key it is: an object with type ("user" or "station"), id, name, email, role."""
        row = self.one("SELECT type, id, name, email, role FROM accounts WHERE key = ?", key)
        return SimpleNamespace(**row) if row else None

    def may_use(self, caller, procedure_id):
        """Whether the caller may see and write runs of the procedure."""
        if caller.type == "user":
            return True
        sql = "SELECT 1 FROM procedures WHERE id = ? AND linked"
        return self.one(sql, procedure_id) is not None

    def run_number(self, caller, id):
        """The number n of a run; one that the caller may not see does not exist for it."""
        run = self.one("SELECT n, procedure_id FROM runs WHERE id = ?", id)
        if run is None or not self.may_use(caller, run["procedure_id"]):
            raise Refused(404, f"Run with ID {id} not found.")
        return run["n"]

    # List and get

    def list_runs(self, caller, args):
        """One page of the runs that all filters let through."""
        where = ["1"]
        values = []
        if caller.type == "station":
            where.append("run.procedure_id IN (SELECT id FROM procedures WHERE linked)")
        for name, _, sql in FILTERS:
            value = args.get(name, "")
            if isinstance(value, list):
                where.append(f"{sql} IN ({marks(value)})")
                values += value
            elif value != "":
                where.append(sql)
                values += [value] * sql.count("?")
        for key, type_of_value, tests in args.get("metadata", ()):
            values += [key, type_of_value]
            condition = ("EXISTS (SELECT 1 FROM metadata WHERE run_n = run.n"
                         " AND key = ? AND type = ?")
            for sql, wanted in tests:
                condition += " AND " + sql.format(marks(wanted))
                values += wanted
            where.append(condition + ")")
        return self.page(args, " AND ".join(where), values)

    def page(self, args, where, values):
        """The page in a total order: of equal runs the one stored later is the greater.

        A first query finds the runs by an index alone, a second one their rows.
        """
        limit = args.get("limit", 50)
        cursor = args.get("cursor", 0)
        column = SORTS[args.get("sort_by", "started_at")]
        direction = args.get("sort_order", "desc")
        order = f"ORDER BY {column} {direction}, run.n {direction}"
        found = select_runs("run.n", where, order + " LIMIT ? OFFSET ?")
        sql = select_runs(ROW, f"run.n IN ({found})", order)
        rows = self.all(sql, *values, limit + 1, cursor)
        data = []
        for row in rows[:limit]:
            shown = show_row(row)
            if args.get("include_metadata"):
                shown["metadata"] = self.metadata(row["n"])
            if args.get("include_sequences"):
                sequences = json.loads(row["details"])["sequences"]
                shown["sequences"] = [each for each in sequences if each["parent_path"] is None]
            data.append(shown)
        has_more = len(rows) > limit
        next_cursor = cursor + limit if has_more else None
        return {"data": data, "meta": {"has_more": has_more, "next_cursor": next_cursor}}

    def metadata(self, n):
        """The metadata of a run."""
        found = {}
        for row in self.all("SELECT * FROM metadata WHERE run_n = ? ORDER BY rowid", n):
            value = row["value"]
            found[row["key"]] = bool(value) if row["type"] == "boolean" else value
        return found

    def get_run(self, caller, args):
        """All of a run."""
        n = self.run_number(caller, args["id"])
        row = self.one(select_runs(ROW, "run.n = ?"), n)
        shown = show_row(row)
        shown.update(json.loads(row["details"]))
        uploads = self.all("SELECT * FROM uploads WHERE run_n = ? ORDER BY place, rowid", n)
        shown["metadata"] = self.metadata(n)
        shown["attachments"] = [self.show_attachment(upload) for upload in uploads]
        shown["sub_units"] = self.all(SUB_UNITS, n)
        return shown

    def show_attachment(self, upload):
        """An upload as the run shows it; size and type are known from finalize on."""
        shown = pick(upload, "id", "name", "size", "content_type")
        is_there = upload["object_size"] is not None
        shown["is_report"] = False
        shown["download_url"] = self.sign("GET", upload["id"]) if is_there else None
        return shown

    # Create

    def create_run(self, caller, run, id=None):
        """Stores what CREATE_RULES made of a body; id is for the examples."""
        self.check_procedure(caller, run["procedure_id"])
        ref = run.get("client_run_ref") if self.knows_ref else None
        content = json.dumps(run, sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        earlier = self.one("SELECT id, digest FROM runs WHERE client_run_ref = ?", ref)
        if earlier and earlier["digest"] == digest:
            return {"id": earlier["id"]}
        if earlier:
            raise Refused(409, f"client_run_ref is that of run {earlier['id']} with other data.")
        self.check_slot_and_deployment(run)
        unit = self.put_unit(run)
        row = pick(run, "procedure_id", "started_at", "ended_at", "outcome", "deployment_id",
                   "execution_id", "slot_key", "slot_name")
        row.update(unit)
        row.update(self.find_operator(run.get("operated_by")))
        row.update(
            id=id or new_id(),
            created_at=int(1000 * self.clock()),
            client_run_ref=ref,
            digest=digest,
            details=json.dumps(show_details(run)),
            docstring=run.get("docstring") or None,
            version_id=self.put("version", run.get("procedure_version"), run["procedure_id"]))
        row[f"{caller.type}_id"] = caller.id
        n = self.add("runs", **row)
        for serial_number in run.get("sub_units", ()):
            self.put_sub_unit(n, unit["unit_id"], serial_number)
        self.set_metadata(n, run.get("metadata", {}))
        return {"id": row["id"]}

    def check_procedure(self, caller, procedure_id):
        """A station learns of no procedure that is not linked to it."""
        if not self.may_use(caller, procedure_id):
            raise Refused(403, f"Station is not authorized for the procedure {procedure_id}."
                               " Link the procedure to the station first.")
        if not self.knows("procedures", procedure_id):
            raise Refused(404, f"Procedure with ID {procedure_id} does not exist. Check the ID.")

    def check_slot_and_deployment(self, run):
        """A slot of an execution has one run; a deployment is one of the procedure."""
        execution_id = run.get("execution_id")
        slot_key = run.get("slot_key")
        taken = "SELECT 1 FROM runs WHERE execution_id = ? AND slot_key = ?"
        if self.one(taken, execution_id, slot_key):
            raise Refused(409, f"Slot {slot_key} of execution {execution_id} has a run already.")
        deployment_id = run.get("deployment_id")
        known = "SELECT 1 FROM deployments WHERE id = ? AND procedure_id = ?"
        if deployment_id is not None and not self.one(known, deployment_id, run["procedure_id"]):
            raise Refused(400, f"Deployment {deployment_id} is not one of the procedure.")

    def find_operator(self, text):
        """The columns of a run for operated_by: an account by its email, else the text."""
        account = self.one("SELECT id FROM accounts WHERE email = lower(trim(?))", text)
        if account:
            return {"operator_id": account["id"], "operator_name": None}
        return {"operator_id": None, "operator_name": text}

    def put(self, kind_of, number, scope=""):
        """The ID of a part, revision, batch or version. It is made if there is none."""
        if number is None:
            return None
        sql = "SELECT id FROM numbers WHERE kind = ? AND scope = ? AND key = lower(?)"
        row = self.one(sql, kind_of, scope, number)
        if row:
            return row["id"]
        id = new_id()
        self.add("numbers", id=id, kind=kind_of, scope=scope, key=number.lower(), number=number)
        return id

    def put_unit(self, run):
        """Makes or reuses the unit under test. Returns unit_id, part_id, revision_id, batch_id."""
        serial_number = run["serial_number"]
        part_number = run.get("part_number")
        unit = self.one("SELECT * FROM units WHERE key = ?", serial_number.lower())
        if unit and not part_number:
            part_id = unit["part_id"]
        else:
            # the organization's rule takes the part from the serial number: PSU-0001 is a PSU
            from_serial = serial_number.rpartition("-")[0] or serial_number
            part_id = self.put("part", part_number or from_serial)
        if not unit:
            unit = {"id": new_id(), "metadata": "{}"}
            self.add("units", number=serial_number, key=serial_number.lower(), **unit)
        values = json.loads(unit["metadata"])
        values.update(run.get("unit_metadata", {}))
        if len(values) > MAX_KEYS:
            raise Refused(400, f"unit_metadata: a unit has at most {MAX_KEYS} keys.")
        self.db.execute("UPDATE units SET part_id = ?, metadata = ? WHERE id = ?",
                        (part_id, json.dumps(values), unit["id"]))
        revision_number = run.get("revision_number", DEFAULT_REVISION)
        return {
            "unit_id": unit["id"],
            "part_id": part_id,
            "revision_id": self.put("revision", revision_number, part_id),
            "batch_id": self.put("batch", run.get("batch_number"))}

    def put_sub_unit(self, n, parent_id, serial_number):
        """Moves a unit below the unit under test; the run shows it if its parent changed."""
        unit = self.one("SELECT id, parent_id FROM units WHERE key = ?", serial_number.lower())
        if not unit:
            raise Refused(404, f"Sub-unit with serial number {serial_number} does not exist.")
        if unit["id"] == parent_id:
            raise Refused(400, f"Sub-unit with serial number {serial_number} is the unit under"
                               " test.")
        if unit["parent_id"] != parent_id:
            self.db.execute("UPDATE units SET parent_id = ? WHERE id = ?", (parent_id, unit["id"]))
            self.add("sub_units", run_n=n, unit_id=unit["id"])

    # Update and delete

    def set_metadata(self, n, changes):
        """Sets keys of a run's metadata; None deletes a key."""
        for key, value in changes.items():
            self.db.execute("DELETE FROM metadata WHERE run_n = ? AND key = ?", (n, key))
            if value is not None:
                self.add("metadata", run_n=n, key=key, type=type_name(value), value=value)

    def update_run(self, caller, args):
        """Links uploads to a run."""
        n = self.run_number(caller, args["id"])
        if self.patch == "replace" and "attachments" in args:
            self.db.execute("UPDATE uploads SET run_n = NULL WHERE run_n = ?", (n,))
        link = "UPDATE uploads SET run_n = ?, place = ? WHERE id = ? AND run_n IS NULL"
        for id in args.get("attachments", ()):
            upload = self.one("SELECT run_n FROM uploads WHERE id = ?", id)
            if not upload or upload["run_n"] not in (None, n):
                raise Refused(404, f"Attachment with ID {id} not found.")
            self.db.execute(link, (n, time.time(), id))
        return {"id": args["id"]}

    def update_metadata(self, caller, args):
        """Sets and deletes keys of a run's metadata."""
        n = self.run_number(caller, args["id"])
        self.set_metadata(n, args.get("metadata", {}))
        if len(self.metadata(n)) > MAX_KEYS:
            raise Refused(400, f"metadata: a run has at most {MAX_KEYS} keys.")
        return {"id": args["id"]}

    def delete_runs(self, caller, args):
        """Deletes those of the runs that exist, with their uploads."""
        deleted = {}
        for id in args["ids"]:
            row = self.one("SELECT n FROM runs WHERE id = ?", id)
            if row:
                deleted[id] = row["n"]
        if not deleted:
            raise Refused(404, "No runs found with these IDs.")
        for n in deleted.values():
            self.delete_uploads("run_n = ?", n)
            for table in ("metadata", "sub_units"):
                self.db.execute(f"DELETE FROM {table} WHERE run_n = ?", (n,))
            self.db.execute("DELETE FROM runs WHERE n = ?", (n,))
        return {"id": list(deleted)}

    def delete_uploads(self, where, *values):
        """Deletes these uploads and their files."""
        stored = f"SELECT id FROM uploads WHERE {where} AND object_size IS NOT NULL"
        for row in self.all(stored, *values):
            with contextlib.suppress(PermissionError):  # on Windows a download may have it open
                os.unlink(self.object_path(row["id"]))
        self.db.execute(f"DELETE FROM uploads WHERE {where}", values)

    # Attachments, and the storage that their URLs lead to

    def create_attachment(self, caller, args):
        """Initializes an upload; where the path names a run, it is linked to it at once."""
        n = self.run_number(caller, args["id"]) if "id" in args else None
        id = new_id()
        self.add("uploads", id=id, name=args["name"], run_n=n, place=time.time())
        return {"id": id, "upload_url": self.sign("PUT", id)}

    def finalize(self, caller, args):
        """Records size and type of the stored object."""
        id = args["id"]
        upload = self.one("SELECT object_size FROM uploads WHERE id = ?", id)
        if not upload:
            raise Refused(404, f"Upload with ID {id} not found.")
        if upload["object_size"] is None:
            raise Refused(404, f"Upload with ID {id} has no file yet: PUT it to its upload_url.")
        self.db.execute("UPDATE uploads SET size = object_size, content_type = object_type"
                        " WHERE id = ?", (id,))
        return {"url": self.sign("GET", id)}

    def whoami(self, caller, args):
        """Whose key it is, and of which organization."""
        organization = {
            "id": self.settings["organization_id"], "slug": "sandbox", "name": "Sandbox"}
        shown = {"type": caller.type, "station": None, "user": None, "organization": organization}
        shown[caller.type] = {"id": caller.id, "name": caller.name}
        if caller.type == "user":
            shown["user"]["email"] = caller.email
        return shown

    def object_path(self, id):
        """Where the bytes of an upload are."""
        return os.path.join(self.folder, id)

    def sign(self, method, id, expires=None):
        """A URL of the storage for one method, one object and a limited time.

        expires is seconds since 1970, or their text in a URL that is to be verified.
        """
        if expires is None:
            life = self.upload_ttl if method == "PUT" else DOWNLOAD_LIFE
            expires = int(self.clock() + life)
        key = self.settings["storage_key"].encode()
        signed = f"{method}\n{id}\n{expires}".encode()
        signature = hmac.new(key, signed, "sha256").hexdigest()
        path = f"/storage/{quote(id, safe='')}"
        return f"{self.origin}{path}?expires={expires}&signature={signature}"

    def put_object(self, id, blocks, content_type):
        """Stores the blocks as the bytes of an upload; nothing of them if they break off."""
        part = self.object_path(f"{id}.{new_id()}")
        try:
            with open(part, "wb") as file:
                for block in blocks:
                    file.write(block)
                size = file.tell()
            os.replace(part, self.object_path(id))
        except BaseException:
            os.unlink(part)
            raise
        sql = "UPDATE uploads SET object_size = ?, object_type = ? WHERE id = ?"
        self.transaction(self.db.execute, sql, (size, content_type, id))

    # Data to start with

    def fill(self, n, seed=0):
        """Adds n synthetic runs, a minute apart and ending now, for measurements."""
        self.transaction(self.add_synthetic_runs, n, random.Random(seed))

    def add_synthetic_runs(self, n, chance):
        """The rows of fill; chance is a random.Random."""
        now = int(1000 * self.clock())
        common = pick(self.settings, "user_id", "procedure_id")
        common["details"] = json.dumps(show_details({}))
        units = []
        for i in range(min(n, 1000)):
            unit = {"serial_number": f"SN-{i:06}", "part_number": f"PCB-{i % 7}",
                    "batch_number": f"B-{i % 12}"}
            units.append(self.put_unit(unit))
        for i in range(n):
            id = uuid.UUID(int=chance.getrandbits(128), version=4)
            started_at = now - 60000 * (n - i)
            ended_at = started_at + chance.randrange(1000, 60000)
            outcome = chance.choice(RUN_OUTCOMES[:3])
            self.add("runs", id=str(id), created_at=ended_at, started_at=started_at,
                     ended_at=ended_at, outcome=outcome, **units[i % len(units)], **common)

    def load_examples(self):
        """The runs and uploads that the documentation's examples name, where they are missing."""
        user = self.account(self.settings["user_key"])
        start = int(1000 * self.clock()) - 86400000
        parse = record(*CREATE_RULES)
        for id in ("run_abc", "run_abc123", "run_a", "run_b"):
            start += 600000
            if not self.knows("runs", id):
                run = parse(Check(self.knows), (), example_run(id, start))
                self.transaction(self.create_run, user, run, id)
        for id in ("att_1", "att_2"):
            if not self.knows("uploads", id):
                self.add("uploads", id=id, name=f"{id}.txt", place=time.time())
                self.put_object(id, [f"The file of {id}.\n".encode()], "text/plain")


def example_run(id, start):
    """The body of a create with a failed measurement; start is its milliseconds since 1970."""
    started_at = show_time(start)
    phase_ended_at = show_time(start + 31000)
    ended_at = show_time(start + 150000)
    measurement = {
        "name": "vcc", "outcome": "FAIL", "measured_value": 3.52, "units": "V",
        "validators": [
            {"operator": ">=", "expected_value": 3.1, "outcome": "PASS"},
            {"operator": "<=", "expected_value": 3.4, "outcome": "FAIL"}]}
    phase = {
        "name": "Power on", "outcome": "FAIL",
        "started_at": started_at, "ended_at": phase_ended_at, "measurements": [measurement]}
    log = {
        "level": "WARNING", "timestamp": phase_ended_at, "message": "vcc above its limit",
        "source_file": "main.py", "line_number": 12}
    return {
        "outcome": "FAIL",
        "procedure_id": "proc_abc",
        "procedure_version": "1.2.3",
        "serial_number": f"SN-{id}",
        "part_number": "PCB-V2",
        "batch_number": "B-2026-07",
        "started_at": started_at,
        "ended_at": ended_at,
        "operated_by": "Night shift",
        "metadata": {"chamber_id": "C-2", "supply_voltage_v": 12.5, "is_retest": False},
        "phases": [phase],
        "logs": [log]}


# ---- http ----------------------------------------------------------------------------------------

MAX_BODY = 64 << 20     # bytes of a request to the API
BLOCK = 64 << 10        # bytes that are read or written at a time
CODES = {408: "TIMEOUT", 413: "PAYLOAD_TOO_LARGE", 422: "UNPROCESSABLE_CONTENT"}

Route = collections.namedtuple("Route", "method path fields operation")
RUN_ID = ("id", uuid_of("runs"), "R")
NAME = ("name", FILE_NAME, "R")
ROUTES = (  # the path is that below /api; fields are those of the query (GET, DELETE) or the body
    Route("GET", "/v2/runs", LIST, Store.list_runs),
    Route("GET", "/v2/runs/{id}", (RUN_ID,), Store.get_run),
    Route("POST", "/v2/runs", CREATE_RULES, Store.create_run),
    Route("PATCH", "/v2/runs/{id}", (RUN_ID, ("attachments", array(uuid_of("uploads")), "O")),
          Store.update_run),
    Route("PATCH", "/v2/runs/{id}/metadata", (RUN_ID, ("metadata", metadata(deletes=True), "O")),
          Store.update_metadata),
    Route("POST", "/v2/runs/{id}/attachments", (RUN_ID, NAME), Store.create_attachment),
    Route("DELETE", "/v2/runs", (("ids", many(uuid_of("runs")), "R"),), Store.delete_runs),
    Route("POST", "/v2/attachments", (NAME,), Store.create_attachment),
    Route("POST", "/v2/attachments/{id}/finalize", (("id", uuid_of("uploads"), "R"),),
          Store.finalize),
    Route("GET", "/v2/whoami", (), Store.whoami))


def matches(pattern, path):
    """A match of all of the path, in any case; {id} is one segment, a last slash may follow."""
    return re.fullmatch(pattern.replace("{id}", "([^/]+)") + "/?", path, re.I)


def read_query(query):
    """'ids=A&ids=B&limit=5' -> {"ids": ["A", "B"], "limit": "5"}; commas split nothing."""
    fields = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if pair:
            fields.setdefault(unquote_plus(name), []).append(unquote_plus(value))
    for name, values in fields.items():
        if len(values) == 1:
            fields[name] = values[0]
    return fields


def read_body(content_type, body):
    """JSON or a form -> dict. A JSON array or text has none of the fields, so it is like {}."""
    if not content_type:
        raise Refused(415, "Missing content-type header")
    is_form = "application/x-www-form-urlencoded" in content_type.lower()
    is_json = content_type.lower().startswith("application/json")
    if not is_form and not is_json:
        raise Refused(415, f"Unsupported content-type {content_type}")
    try:
        text = body.decode()
        fields = read_query(text) if is_form else load_json(text.strip() or "{}")
    except (ValueError, RecursionError):
        raise Refused(400, "Failed to parse request body", code="PARSE_ERROR")
    return fields if isinstance(fields, dict) else {}


def find_route(store, method, path):
    """(Route, fields that stand in the path). HEAD finds each path."""
    for route in ROUTES:
        match = matches("/api" + route.path, path)
        is_missing = route.operation is Store.whoami and not store.knows_ref
        if match and method in (route.method, "HEAD") and not is_missing:
            return route, {"id": unquote(id) for id in match.groups()}
    raise Refused(404, "Not found")


def authenticate(store, header):
    """The account of `Authorization: Bearer KEY`."""
    scheme, _, key = header.partition(" ")
    caller = store.account(key.strip()) if scheme.lower() == "bearer" else None
    if caller is None:
        raise Refused(401, "API key is missing, unknown or revoked.")
    return caller


def answer(store, method, path, query, headers, body):
    """The API without its sockets. Returns the JSON value of a 200, or raises Refused.

    The names of headers are in lower case. The order of the checks is that of the real server.
    """
    route, path_fields = find_route(store, method, path)
    if method == "HEAD":
        return None
    fields = {}
    if method in ("GET", "DELETE"):
        fields = read_query(query)
    elif route.operation is not Store.finalize:     # it has no body, and so no content type
        fields = read_body(headers.get("content-type", ""), body)
    caller = authenticate(store, headers.get("authorization", ""))
    if caller.type == "station" and method == "DELETE":    # whatever the IDs are
        raise Refused(403, "Stations cannot delete runs: forbidden.")
    check = Check(store.knows)
    fields.update(path_fields)
    args = record(*route.fields)(check, (), fields)
    if route.operation is Store.create_run:
        check_across_fields(check, args)
    if check.issues:
        raise Refused(400, "Input validation failed", check.issues)
    if caller.role == "viewer" and method != "GET":
        raise Refused(403, "Viewers cannot change anything: forbidden.")
    return store.transaction(route.operation, store, caller, args)


class Reply:
    """An answer.

    status, headers   of HTTP; Content-Length and Date are added when it is sent
    body              an open binary file, which close() closes
    reason            the text of the status line; None: the usual one
    """

    def __init__(self, status, body=b"", content_type="application/json", reason=None):
        self.status = status
        self.headers = {"Content-Type": content_type} if content_type else {}
        self.body = io.BytesIO(body) if isinstance(body, bytes) else body
        self.reason = reason

    def close(self):
        """Closes the body."""
        self.body.close()


def json_reply(status, value):
    """A JSON value as an answer; None: an empty body."""
    return Reply(status, b"" if value is None else json.dumps(value).encode())


def error_reply(status, message=None, issues=None, code=None):
    """An error of the API."""
    if code is None:
        code = CODES.get(status, HTTPStatus(status).name)
    if message is None:
        message = code.replace("_", " ").capitalize()
    error = {"message": message, "code": code}
    if issues:
        error["issues"] = issues
    return json_reply(status, error)


def storage_error(status, code, message):
    """An error of the storage behind the signed URLs."""
    text = ('<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message></Error>")
    return Reply(status, text.encode(), "application/xml")


def proxy_error(status):
    """An error page of a proxy in front of the server."""
    title = f"{status} {HTTPStatus(status).phrase}"
    text = (f"<html><head><title>{title}</title></head>"
            f"<body><center><h1>{title}</h1></center><hr><center>proxy</center></body></html>\n")
    return Reply(status, text.encode(), "text/html")


PORTAL = b"<!DOCTYPE html><title>Guest network: log in</title>"
FAULTS = {  # kind: (whether the request is processed before, options and their defaults)
    "drop-before": (False, {}),     # the connection is closed without an answer
    "drop-after": (True, {}),
    "reset": (False, {}),           # closed by RST
    "cut": (True, {}),              # the answer ends half-way through its body
    "raw": (False, {"data": b"", "forever": b""}),  # data, then closed, or forever repeated
    # waits seconds, then for a threading.Event, then seconds before each byte of the answer
    "slow": (True, {"delay": 0, "event": None, "drip": 0}),
    # an answer of one's own; body: bytes, a JSON value, or None for the API's error
    "status": (False, {"status": 503, "body": None, "headers": {}, "reason": None}),
    "portal": (False, {"status": 200, "headers": {"Content-Type": "text/html"}, "body": PORTAL}),
    "redirect": (False, {"status": 302, "location": "https://x.test/", "body": b"",
                         "headers": {}}),
    # an error whose status line, header X-Request and message hold the Authorization header
    "echo": (False, {"status": 400}),
    # a proxy's page for a body of more than limit bytes; xml=True: the storage's EntityTooLarge
    "too_large": (False, {"limit": 1 << 20, "status": 413, "xml": False}),
    "waf": (False, {"word": b"", "status": 403}),   # a firewall's page for a body with the word
    "resize": (True, {"size": 0})}  # the body has size bytes: cut off, or filled up with zeros
ENDS = ("drop-before", "drop-after", "reset", "cut", "raw")     # these close the connection
CHAOS = ("drop-before", "drop-after", "reset", "cut", "status")


class Fault:
    """A fault that waits for the requests that it strikes; see Sandbox.fault."""

    def __init__(self, kind, match="* .*", times=1, skip=0, after=False, options=()):
        processed, defaults = FAULTS[kind]
        self.kind = kind
        self.method, _, self.pattern = match.partition(" ")
        self.times = times
        self.skip = skip
        self.after = processed or after
        self.options = dict(defaults, **dict(options))
        unknown = set(self.options) - set(defaults)
        if unknown or not self.pattern:
            raise ValueError(f"fault {kind}: match {match!r} or options {list(options)}")

    def fits(self, request, body):
        """Whether it concerns the request; body is None where nobody has read it."""
        path = re.sub("^/api(?=/)", "", request.path, flags=re.I)
        if self.times == 0 or self.method not in ("*", request.method):
            return False
        if not matches(self.pattern, path):
            return False
        if self.kind == "too_large":
            return request.size > self.options["limit"]
        if self.kind == "waf":
            return body is not None and self.options["word"] in body
        return True

    def strikes(self):
        """Counts a request that fits. Returns whether it is struck."""
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def reply(self, request):
        """The answer of those kinds that have one of their own; None for the others."""
        options = self.options
        if self.kind == "too_large" and options["xml"]:
            message = "Your proposed upload exceeds the maximum allowed size"
            return storage_error(options["status"], "EntityTooLarge", message)
        if self.kind in ("too_large", "waf"):
            return proxy_error(options["status"])
        if self.kind == "echo":
            authorization = request.headers.get("authorization", "")
            reply = error_reply(options["status"], f"Bad request: {authorization}")
            reply.reason = f"Bad Request {authorization}"
            reply.headers["X-Request"] = authorization
            return reply
        return self.made_reply() if "body" in options else None

    def made_reply(self):
        """The answer of status, portal and redirect."""
        options = self.options
        body = options["body"]
        if body is None:
            reply = error_reply(options["status"])
        elif isinstance(body, bytes):
            reply = Reply(options["status"], body)
        else:
            reply = json_reply(options["status"], body)
        reply.reason = options.get("reason")
        reply.headers.update(options["headers"])
        if "location" in options:
            reply.headers["Location"] = options["location"]
        return reply


def read_blocks(file, size):
    """Up to size bytes of a file, in blocks."""
    while size > 0:
        block = file.read(min(BLOCK, size))
        if not block:
            break
        size -= len(block)
        yield block


class Handler(BaseHTTPRequestHandler):
    """One connection: each request is recorded, perhaps meets a fault, and is answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer may wait 40 ms for the client's ACK

    def log_message(self, *args):
        """No log."""

    def handle_any(self):
        """Answers one request."""
        self.received = self.read_head()
        self.left = self.received.size    # bytes of the body that are still to be read
        self.source = self.rfile        # where from
        is_storage = self.received.path.startswith("/storage/")
        if "transfer-encoding" in self.received.headers or self.left > MAX_BODY:
            self.close_connection = True
        body = None
        if self.left <= MAX_BODY and (not is_storage or self.server.reads_uploads()):
            body = b"".join(self.blocks())
            self.source = io.BytesIO(body)      # whoever stores it reads it from here
            self.left = len(body)
        if not is_storage:
            self.received.body = body
        fault = self.server.receive(self.received, body)
        reply = None
        if fault is None or fault.after:
            reply = self.process(is_storage)
        collections.deque(self.blocks(), 0)     # what nobody wanted to read
        try:
            if fault:
                self.strike(fault, reply)
            else:
                self.send(reply)
        finally:
            if reply:
                reply.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any
    do_CONNECT = handle_any

    def read_head(self):
        """What Sandbox.requests keeps of a request."""
        target = re.sub("^https?://[^/]*", "", self.path)   # a proxy is asked for a whole URL
        path, _, query = target.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        size = int(length) if length.isdigit() else 0
        return SimpleNamespace(method=self.command, path=path, query=query, headers=headers,
                               body=None, size=size)

    def blocks(self):
        """The rest of the request's body, in blocks of bounded size."""
        for block in read_blocks(self.source, self.left):
            self.left -= len(block)
            yield block
        if self.left:
            raise ConnectionAbortedError

    def process(self, is_storage):
        """The Reply of the API or the storage."""
        store = self.server.store
        received = self.received
        try:
            if is_storage:
                return self.storage(store)
            if "transfer-encoding" in received.headers:
                raise Refused(501, "Transfer-Encoding is not implemented")
            if received.body is None:
                raise Refused(413, "Request body is too large")
            with store.lock:
                value = answer(store, received.method, received.path, received.query,
                               received.headers, received.body)
            return json_reply(200, value)
        except Refused as error:
            return error_reply(error.status, error.message, error.issues, error.code)
        except OSError:
            raise   # the client is gone
        except Exception:
            self.server.errors.append(traceback.format_exc())
            return error_reply(500, "Internal server error")

    def storage(self, store):
        """PUT and GET of the objects that signed URLs name. It knows no API keys."""
        received = self.received
        id = unquote(received.path[len("/storage/"):])
        args = read_query(received.query)
        if "authorization" in received.headers or received.method not in ("PUT", "GET"):
            return storage_error(403, "AccessDenied", "Access Denied")
        signed_url = store.sign(received.method, id, args.get("expires"))
        signature = signed_url.rpartition("signature=")[2]
        sent_signature = str(args.get("signature"))
        if not hmac.compare_digest(signature.encode(), sent_signature.encode()):
            return storage_error(403, "SignatureDoesNotMatch", "The signature does not match")
        if store.clock() > int(args["expires"]):
            return storage_error(403, "AccessDenied", "Request has expired")
        if received.method == "GET":
            row = store.transaction(store.one, "SELECT * FROM uploads WHERE id = ?", id)
            if not row or row["object_size"] is None:
                return storage_error(404, "NoSuchKey", "The specified key does not exist.")
            return Reply(200, open(store.object_path(id), "rb"), row["object_type"])
        if "content-length" not in received.headers:
            return storage_error(501, "NotImplemented", "PUT needs Content-Length, not chunks")
        content_type = received.headers.get("content-type", "binary/octet-stream")
        store.put_object(id, self.blocks(), content_type)
        return Reply(200, content_type=None)

    def head(self, reply, length):
        """The bytes of an answer before its body."""
        usual = self.responses.get(reply.status, ["Other"])[0]
        reason = usual if reply.reason is None else reply.reason
        lines = [f"HTTP/1.1 {reply.status} {reason}",
                 f"Date: {self.date_time_string(self.server.store.clock())}",
                 f"Content-Length: {length}"]
        for name, value in reply.headers.items():
            lines.append(f"{name}: {value}")
        if self.close_connection:
            lines.append("Connection: close")
        return "\r\n".join(lines + ["", ""]).encode("latin-1", "replace")

    def send(self, reply, share=1.0, drip=0):
        """Sends the head with the first block, then the rest. share=0.5 breaks off half-way.

        drip is the seconds to wait after each byte.
        """
        length = reply.body.seek(0, os.SEEK_END)
        reply.body.seek(0)
        size = 0 if self.command == "HEAD" else int(share * length)
        blocks = read_blocks(reply.body, size)
        self.write(self.head(reply, length) + next(blocks, b""), drip)
        for block in blocks:
            self.write(block, drip)

    def write(self, data, drip):
        """Writes bytes, with a wait after each of them where drip is not 0."""
        if not drip:
            self.wfile.write(data)
            return
        for byte in data:
            self.wfile.write(bytes((byte,)))
            self.server.closing.wait(drip)

    def strike(self, fault, reply):
        """What a fault does with the reply, which is None where the request was not processed."""
        options = fault.options
        if fault.kind in ENDS:
            self.close_connection = True
        if fault.kind == "reset":
            self.reset()
        elif fault.kind == "raw":
            self.wfile.write(options["data"])
            while options["forever"] and not self.server.closing.wait(0.02):
                self.wfile.write(options["forever"])
        elif fault.kind == "cut":
            self.send(reply, share=0.5)
        elif fault.kind == "slow":
            self.server.closing.wait(options["delay"])
            self.wait_for(options["event"])
            self.send(reply, drip=options["drip"])
        elif fault.kind == "resize":
            size = options["size"]
            body = reply.body.read(size).ljust(size, b"\0")
            content_type = reply.headers["Content-Type"]
            self.send(Reply(reply.status, body, content_type))
        else:
            made = fault.reply(self.received)
            if made:
                self.send(made)

    def reset(self):
        """Closes the connection before anybody can send a FIN: that makes it a RST."""
        form = "hh" if os.name == "nt" else "ii"
        linger = struct.pack(form, 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        socket.socket(fileno=self.connection.detach()).close()

    def wait_for(self, event):
        """Waits for a threading.Event, if there is one, or for the sandbox's end."""
        while event and not event.wait(0.02) and not self.server.closing.is_set():
            pass


class Sandbox(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """The server, in threads of this process: `with Sandbox() as box: ...`.

    db, upload_ttl, knows_ref, patch: see Store. tls: an ssl.SSLContext. port: 0 takes a free one.
    examples=True loads the documentation's examples.

    url           origin; the API is below url + "/api". host: the same without the scheme
    user_key, station_key, viewer_key, operator (an email), organization_id, deployment_id,
    user_id, station_id, operator_id, procedure_id, unlinked_procedure_id (not the station's)
    store         the Store: store.db is its database, store.clock() what it takes for the time
    requests      of each its method, path, query, headers (names in lower case), size (as
                  Content-Length says) and body (None for storage); kept while keep is true
    connections   how many were accepted
    on_request    None, or a function that gets each request before it is processed
    errors        tracebacks of what was answered by 500: bugs of the sandbox
    closing       a threading.Event: it is set when the sandbox ends
    """

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = os.name != "nt"   # there it would let two servers share a port

    def __init__(self, db=None, port=0, examples=False, tls=None, upload_ttl=60, knows_ref=True,
                 patch="append"):
        self.tls = tls
        self.connections = 0
        self.on_request = None
        self.keep = True
        self.requests = []
        self.errors = []
        self.faults = []
        self.chance = None
        self.lock = threading.Condition()
        self.closing = threading.Event()
        self.open = set()
        self.store = Store(db, upload_ttl, knows_ref, patch)
        vars(self).update(self.store.settings)
        try:
            if examples:
                self.store.load_examples()
            super().__init__(("127.0.0.1", port), Handler)
        except BaseException:
            self.store.close()
            raise
        scheme = "https" if tls else "http"
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"{scheme}://{self.host}"
        self.store.origin = self.url
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Ends the server and all connections."""
        self.closing.set()
        self.shutdown()
        self.server_close()
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):  # closed already
                    connection.shutdown(socket.SHUT_RDWR)
        self.all_end_within(5)
        self.store.close()

    def all_end_within(self, seconds):
        """Waits for all connections to end, and with them what came on them. Whether they did."""
        with self.lock:
            return self.lock.wait_for(lambda: not self.open, seconds)

    def get_request(self):
        """Accepts a connection; its handshake is left to its own thread."""
        connection, address = super().get_request()
        if self.tls:
            connection = self.tls.wrap_socket(connection, server_side=True,
                                              do_handshake_on_connect=False)
        with self.lock:
            self.connections += 1
            self.open.add(connection)
        return connection, address

    def process_request_thread(self, request, client_address):
        """The thread of a connection."""
        super().process_request_thread(request, client_address)
        with self.lock:
            self.open.discard(request)
            self.lock.notify_all()

    def handle_error(self, *args):
        """Nothing: the client has closed its connection."""

    def fault(self, kind, match=None, times=1, skip=0, after=False, **options):
        """Makes requests fail by a kind of FAULTS, which also says its options.

        match is None for any request, or "METHOD /path": METHOD may be *, the path is a regular
        expression for all of the path without /api and query, in which {id} is one segment. So
        "POST /v2/runs" is create alone, "PUT /storage/{id}" an upload and "GET /storage/{id}" a
        download. The fault strikes times requests (None: all) after it let skip pass; of several
        that fit, the first strikes. after=True: they are processed before.

        drop-before, drop-after, reset, cut   the connection ends
        raw(data, forever)                    these bytes in place of an answer
        slow(delay, event, drip)              the answer comes late, or byte by byte
        status(status, body, headers, reason), portal, redirect(location)   another answer
        echo(status)                          the answer repeats the Authorization header: in its
                                              status line, its header X-Request and its message
        too_large(limit, status=413, xml)     a proxy's page for a body of more than limit bytes;
                                              xml=True: the storage's EntityTooLarge (400 or 413)
        waf(word, status=403)                 a firewall's page for a body that holds the word
        resize(size)                          the answer has another size, and says so

        too_large and waf let all requests pass, and uncounted, that do not fit.
        """
        self.faults.append(Fault(kind, match or "* .*", times, skip, after, options))

    def chaos(self, rate, seed=0, kinds=CHAOS):
        """From now on one of the kinds strikes a share of the requests at random; 0 ends it."""
        self.chance = rate, random.Random(seed), kinds

    def calm(self):
        """Takes back all faults."""
        self.faults = []
        self.chance = None

    def forget_uploads(self):
        """Makes all uploads unknown that no run has."""
        self.store.transaction(self.store.delete_uploads, "run_n IS NULL")

    def reads_uploads(self):
        """Whether a fault needs the bytes of uploads before they are processed."""
        return any(fault.kind == "waf" for fault in self.faults)

    def receive(self, request, body):
        """Remembers a request. Returns the fault that strikes it, or None."""
        if self.keep:
            self.requests.append(request)
        if self.on_request:
            self.on_request(request)
        with self.lock:
            for fault in self.faults:
                if fault.fits(request, body) and fault.strikes():
                    return fault
            if self.chance:
                rate, chance, kinds = self.chance
                if chance.random() < rate:
                    return Fault(chance.choice(kinds))
        return None


class DelayingProxy(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A TCP relay on this machine to a server that seems round_trip seconds away.

    A connection waits one round trip for its handshake; then each burst of bytes takes half a
    round trip in its direction. The relay knows nothing of HTTP or TLS. The sandbox's URLs of the
    storage lead past it, unless store.origin is set to its url.

    url           the target's, with the relay's host and port
    connections   how many were accepted
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, target_url, round_trip):
        target = urlsplit(target_url)
        self.target = (target.hostname, target.port)
        self.half = round_trip / 2
        self.connections = 0
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), None)
        self.url = f"{target.scheme}://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Ends the relay and all its connections."""
        self.closing.set()
        self.shutdown()
        self.server_close()

    def get_request(self):
        """Accepts and counts a connection."""
        self.connections += 1
        return super().get_request()

    def handle_error(self, *args):
        """Nothing: one of the two sides has closed its connection."""

    def finish_request(self, request, client_address):
        """Relays one connection to its end, in its own thread."""
        with socket.create_connection(self.target) as server:
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.relay({request: server, server: request})

    def relay(self, targets):
        """targets has each socket and that to which its bytes go."""
        opened = time.monotonic() + 2 * self.half
        open_sockets = list(targets)
        bursts = collections.deque()    # (when it arrives, target, bytes), in this order
        while (open_sockets or bursts) and not self.closing.is_set():
            wait = 0.1
            if bursts:
                wait = min(wait, max(0, bursts[0][0] - time.monotonic()))
            for source in self.readable(open_sockets, wait):
                data = source.recv(BLOCK)
                arrival = max(opened, time.monotonic()) + self.half
                bursts.append((arrival, targets[source], data))
                if not data:    # the end of this direction
                    open_sockets.remove(source)
            while bursts and bursts[0][0] <= time.monotonic():
                _, target, data = bursts.popleft()
                if data:
                    target.sendall(data)
                else:
                    target.shutdown(socket.SHUT_WR)

    def readable(self, sockets, seconds):
        """Those sockets from which bytes can be read, after these seconds at the latest."""
        if sockets:
            return select.select(sockets, (), (), seconds)[0]
        self.closing.wait(seconds)      # on Windows select needs a socket
        return []


# ---- serve ---------------------------------------------------------------------------------------

def serve(argv):
    """A sandbox until Ctrl-C. Its first lines can be pasted into a shell. Returns exit status."""
    parser = argparse.ArgumentParser(
        prog="test_tofupilot_runs.py serve",
        description="A local server that behaves like the TofuPilot API for runs.")
    parser.add_argument("--port", type=int, default=8787, help="default 8787; 0 takes a free one")
    parser.add_argument("--db", metavar="FILE", help="keep keys, runs and files over a restart")
    parser.add_argument("--examples", action="store_true", help="load the documentation's examples")
    parser.add_argument("--old", action="store_true",
                        help="a server before September 2026: no client_run_ref, no whoami")
    parser.add_argument("--chaos", metavar="RATE", type=float, default=0,
                        help="let this share of the requests fail, such as 0.25")
    args = parser.parse_args(argv)
    try:
        box = Sandbox(args.db, args.port, args.examples, knows_ref=not args.old)
    except (OSError, OverflowError, sqlite3.Error) as error:
        message = f"cannot serve: {error}"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            other = args.port % 65535 + 1
            message = (f"port {args.port} is busy: stop what uses it, or\n"
                       f"  python3 test_tofupilot_runs.py serve --port {other}")
        print(message, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # it leaves no temp folder either
    box.keep = False
    box.chaos(args.chaos, seed=None)
    with box, contextlib.suppress(KeyboardInterrupt):
        print_introduction(box)
        while True:
            time.sleep(3600)
    return 0


def print_introduction(box):
    """What a user needs to talk to a sandbox. It is flushed: a program may wait for it."""
    print(f"export TOFUPILOT_URL={box.url}")
    print(f"export TOFUPILOT_API_KEY={box.user_key}")
    print(f"procedure: {box.procedure_id}  a UUID; proc_abc exists too")
    print(f"station key: {box.station_key}  its station is linked to both procedures")
    print(f"operator: {box.operator}  an account of the organization, for --operated-by",
          flush=True)


# ==== TESTS =======================================================================================
#
# The harness, then the rooms of the script in their order, then hostile servers, odd machines, the
# queue, and the README. A class says in its docstring what it holds; the docstring of a guard's
# test says which change to the script makes it fail (its control).

# ---- harness -------------------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "tofupilot_runs.py")
sys.path.insert(0, HERE)
runs = importlib.import_module("tofupilot_runs")

POSIX = os.name == "posix"
RAM = "/dev/shm" if POSIX and os.access("/dev/shm", os.W_OK) else None    # kills need no fsync
PYENV = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
BEGIN = "2026-05-19T08:00:00Z"
END = "2026-05-19T08:00:42Z"
BODY = {"outcome": "PASS", "procedure_id": "proc_abc", "serial_number": "SN-0001",
        "started_at": BEGIN, "ended_at": END}
UNIT = "create --outcome PASS --procedure-id proc_abc --serial-number SN-0001".split()
CREATE = UNIT + ["--started-at", BEGIN, "--ended-at", END]      # BODY as a command line
NOBODY = "11111111-2222-4333-8444-555555555555"     # an ID that no run has
CLOSED = "http://127.0.0.1:1"                       # where nobody answers
ANY = "* .*"                                        # a fault for every request
ONCE = ("--retries", "0")
QUEUE = ("--queue", "q")
WORLD = "Zoë 測試 \U0001f600"


def create(serial, *more, outcome="PASS", procedure="proc_abc"):
    """The command line of a create."""
    return ["create", "--outcome", outcome, "--procedure-id", procedure, "--serial-number", serial,
            "--started-at", BEGIN, "--ended-at", END, *more]


def save(path, data):
    """Writes bytes to a file. Returns its path."""
    with open(path, "wb") as file:
        file.write(data)
    return path


def content(path):
    """The bytes of a file, {name: content} of a folder, None where nothing is."""
    if os.path.isdir(path):
        names = os.listdir(path)
        return {name: content(os.path.join(path, name)) for name in names}
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def text_of(data):
    """What a process wrote, as text; the line ends of Windows become those of other systems."""
    text = (data or b"").decode("utf-8", "replace")
    return text if POSIX else text.replace("\r\n", "\n")


def unwritable():
    """A file for a stream that no byte can be written to: on a full disk, or opened to be read."""
    if POSIX and os.path.exists("/dev/full"):
        return open("/dev/full", "wb")
    return open(os.path.abspath(__file__), "rb")


def gone_reader():
    """The number of a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


class Ran:
    """What a process of the script, or its main(), did: `status`, `out` and `err` as text."""

    def __init__(self, status, out=b"", err=b""):
        self.status = status
        self.out = text_of(out)
        self.err = text_of(err)

    @property
    def json(self):
        """The JSON document on stdout."""
        return json.loads(self.out)

    @property
    def error(self):
        """The JSON object on stderr."""
        return json.loads(self.err)

    def __repr__(self):
        return f"exit {self.status}\n--- stdout\n{self.out}--- stderr\n{self.err}"


class Stream(io.BytesIO):
    """Bytes in memory that can pass for a terminal."""
    is_terminal = False

    def isatty(self):
        return self.is_terminal

    def as_text(self):
        """The text stream on top of it."""
        return io.TextIOWrapper(self, "utf-8", newline="\n")


def clean_environment():
    """This process's environment without what would change how the script or Python works.

    NO_PROXY also keeps the proxy out that Windows or macOS have in their settings.
    """
    odd = ("COLUMNS", "NO_COLOR", "REQUEST_METHOD")
    found = {}
    for name, value in os.environ.items():
        is_proxy = name.lower().endswith("_proxy")
        is_ours = name.startswith(("TOFUPILOT_", "PYTHON"))
        if not is_proxy and not is_ours and name not in odd:
            found[name] = value
    found.update(NO_PROXY="no-host.invalid", PYTHONIOENCODING="utf-8")
    return found


# Starts a process in a console of its own on Windows, where Ctrl-C goes to all that have the same
# console. A byte on stdin presses it.
CONSOLE = """
import ctypes, os, subprocess, sys, threading
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
kernel = ctypes.windll.kernel32
kernel.SetConsoleCtrlHandler(None, True)        # not for this process
def press():
    while os.read(0, 1):
        kernel.GenerateConsoleCtrlEvent(0, 0)
threading.Thread(target=press, daemon=True).start()
os._exit(process.wait())
"""
CREATE_NO_WINDOW = 0x08000000       # a console that is not shown


class Case(unittest.TestCase):
    """A test with a sandbox, in a folder of its own, that is also its home.

    Commands run inside this process (ok, fails, inside), which is quick and lets things be
    patched, or in a process of their own (run_script, start).
    """
    maxDiff = None
    options = {}        # keyword arguments of the Sandbox
    place = None        # where its folder is made; None: the usual place

    def setUp(self):
        folder = tempfile.mkdtemp("", "tofupilot-test-", self.place)
        self.folder = os.path.realpath(folder)
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.box = self.another(**self.options)
        self.env = clean_environment()
        self.env.update(
            HOME=self.folder,
            USERPROFILE=self.folder,
            TOFUPILOT_HOME=self.at("home"),
            TOFUPILOT_URL=self.box.url,
            TOFUPILOT_API_KEY=self.box.user_key)
        patched = mock.patch.dict(os.environ, self.env, clear=True)
        patched.start()
        self.addCleanup(patched.stop)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def another(self, **options):
        """One more sandbox, for as long as the test."""
        box = Sandbox(**options)
        self.addCleanup(lambda: self.assertEqual(box.errors, []))
        self.addCleanup(box.close)
        return box

    # Commands

    def popen(self, *words, env=(), **more):
        """A process in the test's folder, with pipes where `more` names no other streams."""
        if POSIX:   # as bytes, since Python 3.6 encodes words as ASCII where LC_ALL is C
            words = [os.fspath(word) for word in words]
            words = [word.encode("utf-8", "surrogateescape") if isinstance(word, str) else word
                     for word in words]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        streams.update(more)
        environment = dict(self.env, **dict(env))
        process = subprocess.Popen(words, env=environment, cwd=self.folder, **streams)
        self.addCleanup(process.kill)
        return process

    def start(self, *args, **more):
        """A process of the script."""
        return self.popen(sys.executable, "-I", "-S", "-W", "error", SCRIPT, *args, **more)

    def start_interruptible(self, *args):
        """A process of the script for interrupt(). Any moment is any line: so without -W error."""
        words = [sys.executable, SCRIPT, *args]
        if POSIX:
            return self.popen(*words)
        console = [sys.executable, "-I", "-S", "-c", CONSOLE]
        return self.popen(*console, *words, creationflags=CREATE_NO_WINDOW)

    def interrupt(self, process, number=signal.SIGINT):
        """Sends it a signal, or presses Ctrl-C in its console."""
        if POSIX:
            process.send_signal(number)
        else:
            process.stdin.write(b"c")
            process.stdin.flush()

    def ended(self, process, status=None, input=b""):
        """The Ran of a process, which must come to its end, with this status if one is given."""
        with process:
            try:
                out, err = process.communicate(input, 60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        ran = Ran(process.returncode, out, err)
        self.assertNotIn("Traceback", ran.err)
        if status is not None:
            self.assertEqual(ran.status, status, (process.args, ran))
        return ran

    def run_script(self, *args, status=None, input=b"", **more):
        """Runs the script in a process to its end. Returns its Ran."""
        return self.ended(self.start(*args, **more), status, input)

    def inside(self, *args, tty=False, input=b"", env=()):
        """main() in this process, its waits between tries made short. Returns its Ran."""
        out, err, stdin = Stream(), Stream(), Stream(input)
        out.is_terminal = err.is_terminal = stdin.is_terminal = tty
        streams = mock.patch.multiple(
            sys,
            stdout=out.as_text(),
            stderr=err.as_text(),
            stdin=stdin.as_text())
        variables = dict(self.env, **dict(env))
        environment = mock.patch.dict(os.environ, variables, clear=True)
        no_waits = mock.patch.object(runs, "delay", lambda *_, **__: 0.001)
        if POSIX and sys.version_info < (3, 7):
            args = [os.fsdecode(arg.encode("utf-8", "surrogateescape")) for arg in args]
        handler = signal.getsignal(signal.SIGTERM)
        with streams, environment, no_waits, warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)    # of the sandbox's connections
            try:
                status = runs.main(list(args))
                sys.stdout.flush()      # as at the end of a process
                sys.stderr.flush()
                return Ran(status, out.getvalue(), err.getvalue())
            finally:
                signal.signal(signal.SIGTERM, handler)

    def fails(self, status, *args, **more):
        """inside(), which must end with this status and in order. Returns its Ran."""
        ran = self.inside(*args, **more)
        self.assertEqual(ran.status, status, (args, more, ran))
        return self.orderly(ran)

    def ok(self, *args, **more):
        """inside(), which must succeed. Returns its Ran."""
        return self.fails(0, *args, **more)

    def orderly(self, ran):
        """Asserts that stderr has one error at most, and nothing of Python's own. Returns ran."""
        self.assertNotRegex(ran.err, r"Traceback|unexpected \w+:|Exception|Warning")
        self.assertLessEqual(ran.err.count("error:"), 1)
        return ran

    def terminal(self, *args, answer=b"", **env):
        """Runs the script on a terminal of 80 columns and types the answer: (status, text).

        Python has no pseudo-terminals on Windows: there the streams say that they are a terminal.
        """
        environment = dict({"COLUMNS": "80", "TERM": "xterm"}, **env)
        if not POSIX:
            with mock.patch.object(runs, "console_takes_colour", lambda: True):
                answer = answer.strip(b"\x04")      # the end of the input
                ran = self.inside(*args, tty=True, input=answer, env=environment)
            return ran.status, ran.out + ran.err
        import pty
        master, slave = pty.openpty()
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        words = [sys.executable, "-I", "-S", SCRIPT, *args]
        process = self.popen(*words, env=environment, **streams)
        text = b""
        with process:
            os.close(slave)
            os.write(master, answer)
            with contextlib.suppress(OSError):      # Linux says EIO at the end
                for block in iter(lambda: os.read(master, 65536), b""):
                    text += block
            os.close(master)
        return process.returncode, text.decode("utf-8").replace("\r\n", "\n")

    # What is here and what is on the server

    def at(self, *names):
        """A path in the test's folder."""
        return os.path.join(self.folder, *names)

    def file(self, name, content=b"content\n"):
        """The path of a new file in the test's folder."""
        return save(self.at(name), content)

    def client(self, **more):
        """A Client of the sandbox, closed at the end of the test."""
        client = runs.Client(self.box.url, self.box.user_key, **more)
        self.addCleanup(client.close)
        return client

    def made(self, **fields):
        """The ID of a run that another client created."""
        run = self.client().create(**dict(BODY, **fields))
        del self.box.requests[:]
        return run["id"]

    def put(self, run_id, name, data):
        """Attaches a file as another client does."""
        made = self.client().create_attachment(run_id, name)
        headers = {"Content-Type": "x/y"}
        request = WebRequest(made["upload_url"], data, headers, method="PUT")
        urlopen(request).close()
        self.client().finalize(made["id"])

    def whole(self):
        """What get answers for a run that has something in every field."""
        run_id = self.made(**REPORTED)
        self.put(run_id, "a.txt", b"x")
        sub_units = [{"serial_number": "S", "part_number": "P"}]
        return dict(self.client().get(run_id), sub_units=sub_units)

    def attached(self, run_id):
        """The names of a run's attachments."""
        run = self.client().get(run_id)
        return [row["name"] for row in run["attachments"]]

    def stored(self):
        """IDs of all runs on the server."""
        rows = self.box.store.all("SELECT id FROM runs ORDER BY n")
        return [row["id"] for row in rows]

    def sent(self, *methods):
        """(method, path, query, body) of what arrived since the last time, or of these methods."""
        found = []
        for request in self.box.requests:
            if methods and request.method not in methods:
                continue
            is_api = request.path.startswith("/api/")
            path = request.path[len("/api"):] if is_api else "/storage"
            query = parse_qsl(request.query, keep_blank_values=True)
            body = json.loads(request.body.decode()) if request.body else None
            found.append((request.method, path, query, body))
        del self.box.requests[:]
        return found

    def says(self, match, body, status=200, times=None, skip=0, **headers):
        """Requests that match get this answer, the others theirs."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, bytes):
            headers.setdefault("Content-Type", "application/json")
        self.box.calm()
        self.box.fault("status", match, times=times, skip=skip, status=status, body=body,
                       headers=headers)

    def shows(self, url, **more):
        """get answers a run with one attachment at this URL; /storage/x has 4 bytes."""
        attachment = dict(FILE, download_url=url, **more)
        self.says("GET /v2/runs/{id}", {"id": "a", "attachments": [attachment]})
        self.box.fault("status", "GET /storage/x", times=None, status=200, body=b"data")


# ---- tests: values -------------------------------------------------------------------------------

# Needs no data of time zones. Windows reads no more of it than the names and the five hours, and
# changes its clocks on the days of the USA, which these are.
NEW_YORK = "EST5EDT,M3.2.0,M11.1.0"


def in_new_york(test):
    """A test that runs in a process that begins in this time zone: Windows has no tzset."""
    @functools.wraps(test)
    def run(case):
        if os.environ.get("TZ") == NEW_YORK:
            return test(case)
        name = case.id().partition(".")[2]
        words = [sys.executable, "-B", os.path.abspath(__file__), "run-class", name]
        ran = subprocess.run(words, env=dict(os.environ, TZ=NEW_YORK), stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return case.assertEqual(ran.returncode, 0, text_of(ran.stdout))
    return run


@contextlib.contextmanager
def time_zone(name):
    """This process in another time zone, where it can change; else it is only named."""
    set_it = getattr(time, "tzset", lambda: None)
    try:
        with mock.patch.dict(os.environ, TZ=name):
            set_it()
            yield
    finally:
        set_it()


def utf_encodings():
    """Names of the encodings that an input file may have."""
    return ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le",
            "utf-32-be")


class Values(unittest.TestCase):
    """Text to wire format and back: times, durations, JSON, names."""

    def table(self, function, *cases):
        """function(value) is what stands beside each value; ValueError: it raises that."""
        for value, expected in cases:
            if expected is ValueError:
                with self.assertRaises(ValueError, msg=repr(value)):
                    function(value)
            else:
                self.assertEqual(function(value), expected, repr(value))

    def test_the_examples_in_docstrings_hold(self):
        result = doctest.testmod(runs)
        self.assertEqual(result.failed, 0)
        self.assertGreater(result.attempted, 20)

    def test_a_whole_time_is_read_in_every_form_and_a_wrong_one_refused(self):
        self.table(
            runs.parse_time,
            ("2026-05-19T08:00:00z", BEGIN),
            ("2026-05-19t08:00+0530", "2026-05-19T08:00:00+05:30"),
            ("2026-05-19T08:00+02", "2026-05-19T08:00:00+02:00"),
            ("2026-05-19 08:00:00.123456789 -0100", "2026-05-19T08:00:00.123456789-01:00"),
            ("2026-05-19T08:00:00,5+05:45", "2026-05-19T08:00:00.5+05:45"))
        for text in ("", "2026-13-01T00:00Z", "2026-05-19T24:00Z", "20260519T080000Z",
                     "1779177600", "2026-05-19T08:00:00+24:00", "2026-05-19T08:00:00+02:60",
                     "\u0662026-05-19T08:00Z", "5y", "90s", "now", "today", "2026-05-19",
                     "0001-01-01T00:00:00+02:00", "9999-12-31T23:59:59-12:00"):
            self.table(runs.parse_time, (text, ValueError))

    def test_a_time_to_compare_with_may_be_relative(self):
        now = datetime.datetime(2026, 5, 19, 8, tzinfo=datetime.timezone.utc)
        self.table(
            lambda text: runs.parse_when(text, now),
            ("90S", "2026-05-19T07:58:30.000+00:00"), ("7d", "2026-05-12T08:00:00.000+00:00"),
            ("2w", "2026-05-05T08:00:00.000+00:00"), ("now", "2026-05-19T08:00:00.000+00:00"),
            (" Now ", "2026-05-19T08:00:00.000+00:00"), (BEGIN, BEGIN),
            ("999999999w", ValueError), ("soon", ValueError), ("2026-02-30", ValueError),
            ("tomorrow", ValueError))

    @in_new_york
    def test_a_date_today_and_yesterday_are_local_midnight(self):
        """Control: take midnight in UTC, or the offset of now for another day."""
        now = datetime.datetime(2026, 3, 8, 10).astimezone()    # the day that loses an hour
        self.table(
            lambda text: runs.parse_when(text, now),
            ("today", "2026-03-08T00:00:00-05:00"),
            ("Yesterday", "2026-03-07T00:00:00-05:00"),
            ("2026-07-01", "2026-07-01T00:00:00-04:00"),
            ("1960-01-01", "1960-01-01T00:00:00-05:00"))

    def test_one_instant_has_one_spelling_in_utc(self):
        self.table(
            runs.utc_text, ("2026-01-01T00:30:00+01:00", "2025-12-31T23:30:00Z"),
            ("2026-05-19T08:00:00.000Z", BEGIN),
            ("2026-05-19T08:00:00.1200-00:30", "2026-05-19T08:30:00.12Z"))

    def test_a_time_zone_without_data_is_known_as_such_and_others_are_not(self):
        """Control: compare the offset alone."""
        for name, expected in (
                ("Nowhere/Such", "Nowhere/Such"),
                (":Nowhere/Such", "Nowhere/Such"),
                ("No/Such", "No/Such"),
                ("UTC", None),
                ("Etc/UTC", None),
                ("GMT", None),
                ("UTC0", None),
                (NEW_YORK, None)):
            with time_zone(name):
                self.assertEqual(runs.unknown_time_zone(), expected, name)

    def test_windows_knows_no_time_zone_by_its_name(self):
        """It takes the first three letters for UTC. Control: look at the offset there too."""
        with mock.patch.object(runs, "ON_WINDOWS", True):
            for name, expected in (("Europe/Berlin", "Europe/Berlin"),
                                   ("EST", "EST"),
                                   ("UTC", None),
                                   (NEW_YORK, None)):
                with time_zone(name):
                    self.assertEqual(runs.unknown_time_zone(), expected, name)

    def test_durations_are_read_as_people_write_them(self):
        self.table(
            runs.parse_duration, ("90s", "PT90S"), ("1.5h", "PT5400S"), ("2d", "PT172800S"),
            ("0.25s", "PT0.25S"), ("p1dt2h", "P1DT2H"), ("P2W", "P2W"), ("PT", ValueError),
            ("P", ValueError), ("90", ValueError), ("-5s", ValueError), ("", ValueError),
            ("s", ValueError), ("P1W2D", ValueError))
        self.table(
            runs.duration_text, ("P2W", "14d"), ("PT0S", "0s"), ("P1Y", "P1Y"), (None, ""),
            ([1], "[1]"), ("x", "x"), ("PT3H5M7S", "3h 5m"))

    def test_sizes_are_told_in_one_form(self):
        self.table(
            runs.size_text, (0, "0 B"), (None, "size unknown"), ("9", "size unknown"),
            (1500, "1.5 KB"), (184321, "184 KB"), (3e9, "3.0 GB"), (1e308, "size unknown"))

    def test_a_word_of_set_is_a_number_only_as_json_writes_it(self):
        self.table(runs.parse_word, ("false", False), ("-1.5", -1.5), ("1.0", 1.0), ("0", 0),
                   ("null", None), ('"1.1"', "1.1"))
        for text in ("1e3", "1.", "1.10", "007", "True", "NaN", "1e999", '{"a":1}', "[]", "", " 1",
                     "+1", "-0", "0x1", "1_0", "\u0662", "-1e999"):
            self.table(runs.parse_word, (text, text))

    def test_a_name_of_a_file_stays_in_its_folder_on_every_system(self):
        self.table(
            runs.safe_name, ("a.txt", "a.txt"), ("../../x", ".._.._x"), ("", "attachment"),
            ("nul.txt", "_nul.txt"), ("...", "attachment"), ("a. ", "a"), ("COM1", "_COM1"),
            ("a\x00\u202eb", "a__b"), ("C:\\x|y", "C__x_y"), ("console", "console"),
            ("CONIN$", "_CONIN$"), ("conout$.txt", "_conout$.txt"), ("NUL .x", "_NUL .x"),
            ("COM1 .txt", "_COM1 .txt"), ("COM\u00b9", "_COM\u00b9"))
        name = runs.safe_name("\u6e2c" * 300 + ".tar.gz")
        self.assertLessEqual(len(os.fsencode(name)), 200)
        self.assertTrue(name.endswith(".gz"))

    def test_the_servers_json_is_strict(self):
        self.table(runs.load_json, ('{"a": "\u00e9"}', {"a": "\u00e9"}))
        for text in ("NaN", "[Infinity]", "[" * 200000, "{'a': 1}", "", "[1] x"):
            self.table(runs.load_json, (text, ValueError))

    def test_json_that_somebody_wrote_is_read_in_every_encoding(self):
        """Control: decode as UTF-8."""
        for encoding in utf_encodings():
            for text in ('{"a": "\u00e9"}\r\n', '{"a": "\u00e9"}\x1a'):
                found = runs.load_input_json(text.encode(encoding))
                self.assertEqual(found, {"a": "\u00e9"}, (encoding, text))

    def test_a_key_that_stands_twice_is_refused_by_name_at_any_depth(self):
        """Control: json.loads without the hook takes the last one."""
        for text in ('{"outcome": "FAIL", "x": 1, "outcome": "PASS"}',
                     '[{"outcome": 1, "outcome": 1}]',
                     '{"a": {"b": [{"outcome": 1, "outcome": 2}]}}'):
            with self.assertRaisesRegex(ValueError, 'the key "outcome" is given twice'):
                runs.load_input_json(text)
        self.assertEqual(runs.load_input_json('{"a": {"b": 1}, "b": {"b": 1}}'),
                         {"a": {"b": 1}, "b": {"b": 1}})

    def test_what_is_wrong_in_json_is_told_with_its_place_and_text(self):
        """Control: tell json's message alone."""
        for data, told in (
                (b'{\n  "a": 1,\n  "b": [1, 2\n}', "line 4, column 1: }"),
                (b'{\n "a": 1,\n}', 'line [23], column .*["}]'),      # 3.13 tells the comma
                (b'{"a": .5}', 'line 1, column 7: {"a": [.]5}'),
                (b'{\n "note": "M\xfcller"}', "line 2, column 12: .*0xfc.*UTF-8")):
            with self.assertRaisesRegex(ValueError, told):
                runs.load_input_json(data)

    def test_text_is_harmless_where_it_is_shown(self):
        self.table(
            runs.printable, ("a\tb\r\n\x9b2J", "a\\tb\\r\\n\\x9b2J"), ("\u00e9\u6e2c",) * 2,
            ("\ud800", "\\ud800"), (None, "null"), ([1, "\x1b"], '[1, "\\u001b"]'))

    def test_text_columns_of_csv_stay_as_they_are_and_become_no_formula(self):
        self.table(
            runs.csv_text, ("-1", "-1"), ("+1e5", "+1e5"), ("-1-2", "'-1-2"), ("@x", "'@x"),
            ("\t=1", "'\t=1"), (" =1", "' =1"), ("\uff1d1", "'\uff1d1"), ("a=1", "a=1"),
            ("\r=1", "'\\r=1"), ("+a|'/c b'!A0", "'+a|'/c b'!A0"), ("-12V", "'-12V"),
            ("\x1b[2J", "\\x1b[2J"), ("2026-W20", "2026-W20"), ("-12.5", "-12.5"), (None, ""),
            (True, "true"), (BEGIN, BEGIN), ("00042", "00042"))

    def test_a_text_that_looks_like_a_time_stays_as_it_is(self):
        """Control: look at the value, not at the name of the column."""
        for path in ("unit.serial_number", "docstring", "metadata.date", "format"):
            for is_terminal in (True, False):
                self.assertEqual(runs.format_cell(BEGIN, path, is_terminal), BEGIN)
        local = "2026-05-19T10:00:00+02:00"
        self.assertEqual(runs.format_cell(local, "started_at", False), BEGIN)
        self.assertIn("ago", runs.format_cell(local, "started_at", True))


# ---- tests: fields and help ----------------------------------------------------------------------

GLOBAL_FLAGS = ("--json --format --columns --out -q -v --dry-run --url --api-key-file --ca-cert "
                "--timeout --retries --allow-http").split()
COMMANDS_OF_API = ("ls", "get", "create", "update", "update-metadata", "create-attachment", "rm",
                   "attachments initialize", "attachments finalize")     # in the order of ROUTES
OWN_FLAGS = {
    "ls": "--all --page-size --fail-empty --summary",
    "get": "--ids --serial-number --failed-only --logs --download --exit-status",
    "create": "--set --body --attach --example --queue --offline",
    "update-metadata": "--set --unset", "create-attachment": "--file", "rm": "--yes"}


def flag_of(field):
    """The flag of a field of ROUTES."""
    return "--" + field[0].replace("_", "-")


def help_flags(text):
    """The flags that stand at the beginning of a line of a help."""
    return set(re.findall(r"^ +(--?[a-z-]+)", text, re.M)) - {"--help", "-h"}


class Help(Case):
    """The table of fields makes all flags, and the help is the manual of a station."""

    def test_every_flag_of_the_api_is_there_and_no_other_than_these(self):
        for command, route in zip(COMMANDS_OF_API, ROUTES):
            own = set(OWN_FLAGS.get(command, "").split())
            flags = {flag_of(field) for field in route[2]} | own
            if command == "get":
                flags.remove("--id")        # the singular of --ids
            text = self.ok(*command.split(), "--help").out
            self.assertEqual(help_flags(text) - set(GLOBAL_FLAGS), flags, command)
        self.ok("get", "--id", self.made())

    def test_each_help_names_the_flags_of_every_command_and_points_to_the_manual(self):
        for command in runs.COMMANDS:
            text = self.ok(*command.split(), "--help").out
            last = text[text.index("every command:"):]
            self.assertEqual(sorted(re.findall(r"--?[a-z-]+", last)),
                             sorted(GLOBAL_FLAGS + ["--help"]), command)
            self.assertIn("tofupilot_runs.py --help explains", last)
            self.assertLess(last.count("\n"), 6)
        manual = self.ok("--help").out
        self.assertEqual(help_flags(manual), set(GLOBAL_FLAGS) | {"--version"})

    def test_script_and_sandbox_know_the_same_fields_and_needs(self):
        needs = {}
        for operation in runs.OPERATIONS.values():
            fields = {field.name: field.required for field in operation.fields}
            needs[operation.method, operation.path] = fields
        for method, path, fields, _ in ROUTES:
            expected = {name: rule == "R" for name, _, rule in fields}
            self.assertEqual(needs.pop((method, path)), expected, path)
        self.assertEqual(needs, {})

    def test_nested_fields_are_those_of_the_sandbox(self):
        body = json.loads(json.dumps(dict(BODY, **FULL)))
        findings = runs.examine("create", body)[1]
        self.assertEqual(findings.problems, [])
        warning, = findings.warnings
        self.assertTrue(warning.startswith("phases[0].newer: unknown field"), warning)

    def test_help_tells_groups_meaning_values_and_an_example_of_each_flag(self):
        text = self.ok("ls", "--help").out
        titles = ("which runs", "unit", "when", "who", "metadata", "page and order", "output")
        order = [text.index(f"\n{title}:") for title in titles]
        self.assertEqual(order, sorted(order))
        self.assertLess(text.index("ls --procedure-ids"), order[0])      # examples come first
        for word in "PASS FAIL ERROR TIMEOUT ABORTED production golden started_at asc".split():
            self.assertIn(word, text)
        for command in runs.COMMANDS.values():
            for field in command.fields:
                self.assertTrue(field.help, field.name)
                self.assertTrue(field.group, field.name)
                self.assertTrue(field.example or field.kind == "flag", field.name)

    def test_no_help_is_wider_than_79_columns(self):
        """Control: break the line of an example once."""
        for path in ["", "runs", *runs.FAMILIES, *runs.COMMANDS]:
            for line in self.ok(*path.split(), "--help", env={"COLUMNS": "200"}).out.splitlines():
                if not line.startswith((" " * 10, "  --")):     # flags use the terminal's width
                    self.assertLess(len(line), 80, line)

    def test_usage_and_lists_of_flags_fit_a_narrow_terminal(self):
        """Control: break them at 72 columns whatever the terminal has."""
        text = self.ok("create", "--help", env={"COLUMNS": "40"}).out
        for part in (text[:text.index("\n\n")], text[text.index("every command:"):]):
            for line in part.splitlines():
                self.assertLess(len(line), 41, line)

    def test_the_columns_that_can_be_asked_for_are_in_the_help(self):
        """Control: leave the columns out of a Command."""
        for command, names in (("ls", runs.RUN_CSV_COLUMNS), ("get", runs.MEASUREMENT_COLUMNS)):
            text = " ".join(self.ok(command, "--help").out.split())
            self.assertIn("--columns: " + " ".join(names), text)

    def test_required_flags_say_so_in_the_help_and_in_the_usage_line(self):
        """Control: leave required out of help_text or usage_of."""
        text = self.ok("create", "--help").out
        usage = text.split("\n\n")[0]
        for name in runs.REQUIRED:
            flag = runs.flag_name(name)
            self.assertIn(flag, usage)
            meaning = text[text.index("\n  " + flag + " "):]
            self.assertIn("(required)", " ".join(meaning.split())[:200], flag)
        self.assertNotIn("--part-number", usage)
        self.assertIn("update-metadata ID [flags]", self.ok("update-metadata", "--help").out)
        self.assertIn("get ID ... [flags]", self.ok("get", "--help").out)

    def test_help_needs_neither_network_nor_disk_nor_a_key(self):
        for words in ("--help", "-h", "help", "help ls", "ls --help", "attachments --help",
                      "runs --help", "queue --help", "queue fix -h"):
            ran = self.ok(*words.split(), env={"TOFUPILOT_URL": "nonsense://"})
            self.assertEqual(ran.err, "")
            self.assertIn("tofupilot_runs.py", ran.out)
        self.assertFalse(os.path.exists(self.env["TOFUPILOT_HOME"]))
        self.assertEqual(self.sent(), [])

    def test_the_top_help_is_the_manual(self):
        text = self.ok("--help").out
        for word in ("ls get create update update-metadata create-attachment rm attachments queue "
                     "check 130 143 TOFUPILOT_API_KEY TOFUPILOT_URL TOFUPILOT_CA_CERT NO_COLOR "
                     "TOFUPILOT_HOME TOFUPILOT_QUEUE HTTPS_PROXY --offline --exit-status "
                     "today yesterday @FILE parked").split():
            self.assertIn(word, text)
        self.assertLess(max(map(len, text.splitlines())), 80)

    def test_a_call_without_a_command_is_no_success_and_says_the_first_steps(self):
        ran = self.fails(2)
        self.assertEqual(ran.out, "")
        for word in ("--help", "TOFUPILOT_API_KEY", "check"):
            self.assertIn(word, ran.err)

    def test_the_version_tells_what_an_audit_of_many_copies_asks(self):
        text = self.ok("--version").out
        digest = hashlib.sha256(content(SCRIPT)).hexdigest()
        for word in (runs.__version__, sys.version.split()[0], "OpenSSL", digest,
                     os.path.abspath(SCRIPT)):
            self.assertIn(word, text)

    def test_a_field_of_a_wrong_kind_is_an_error_when_the_file_is_imported(self):
        for more in (dict(kind="txt"), dict(kind="enum"), dict(kind="record"),
                     dict(kind="text", choices=("A",))):
            with self.assertRaises((KeyError, TypeError)):
                runs.Field("name", **more)


# ---- tests: checks -------------------------------------------------------------------------------

PLAIN_REF = "fa2cc2a9305be0aefd351a9094424f25504d6b294ff8bfc4fcf2d20a6d627727"
FULL_REF = "f7e76d59b3a25def63efd3fd85d830a37f493cae4719bbcb63aeea583e993708"
FULL = json.loads(r"""{
    "deployment_id": "dep 1", "client_run_ref": "mine/1", "execution_id": "ex/1",
    "slot_key": "s+1", "slot_name": "Left nest \u2713", "procedure_version": "1.2.3",
    "operated_by": "Ad\u00e0 & co", "part_number": "PCB01", "revision_number": "B",
    "batch_number": "2026-W20", "sub_units": ["P-1", "F-2"],
    "docstring": "two\nlines Zo\u00eb \u6e2c\u8a66 \ud83d\ude00",
    "phases": [{
        "name": "p", "outcome": "SKIP", "started_at": "2026-05-19T08:00:00.5+02:00",
        "ended_at": "2026-05-19T08:00:01+02:00", "retry_count": 2, "docstring": null,
        "sequence_path": "a/b", "newer": {"field": [1]},
        "measurements": [
            {"name": "v", "outcome": "PASS", "measured_value": 9999999999999999, "units": "V",
             "lower_limit": 3,
             "validators": [
                {"outcome": "PASS", "operator": "range", "expected_value": [1.5, 2]},
                {"operator": "==", "expected_value": {"k": [1, null]}, "is_decisive": false,
                 "expression": "x is fine"}],
             "aggregations": [{"type": "%max", "value": "n/a", "validators": [
                {"outcome": "PASS", "operator": "range", "expected_value": [1.5, 2]},
                {"operator": "==", "expected_value": {"k": [1, null]}, "is_decisive": false,
                 "expression": "x is fine"}]}]},
            {"name": "xy", "outcome": "UNSET", "x_axis": {"data": [0, -2.5], "units": "s"},
             "y_axis": [{"data": [1, 1], "name": "\u00e9"}]},
            {"name": "old", "outcome": "FAIL", "measured_value": [[1, 2]], "units": ["s", "V"]}]}],
    "sequences": [
        {"path": "a", "name": "A", "outcome": "PASS"},
        {"path": "a/b", "name": "B", "outcome": "SKIP", "started_at": null}],
    "logs": [{"level": "DEBUG", "timestamp": "2026-05-19T08:00:00Z", "source_file": "a.py",
              "message": "Zo\u00eb \u6e2c\u8a66 \ud83d\ude00", "line_number": 3}],
    "metadata": {"shift": "A", "temp": 23.4, "n": 12, "ok": false}, "unit_metadata": {"w": 1.0},
    "config": [{"key": "k", "value": true, "version": 3, "source": "station"}],
    "secrets": [{"key": "s", "variable_id": "v", "source": "dotenv"}]
}""")    # a value for each field that BODY does not have


def body_with(measurement=None, **more):
    """A create's body with two phases; the second has a measurement with these fields."""
    first = {"name": "p", "outcome": "PASS", "started_at": BEGIN, "ended_at": END}
    row = dict({"name": "m", "outcome": "PASS"}, **measurement or {})
    return dict(BODY, phases=[first, dict(first, measurements=[row])], **more)


def cells_of(table):
    """The cells of each line of a table in text, which stand between > with spaces around."""
    for line in table.strip("\n").replace("\\\n", "").splitlines():
        yield line.split(" > ")


def problems_of(body):
    return runs.examine("create", body)[1].problems


MEASUREMENT_PATH = "phases[1].measurements[0]"
# Fields of a measurement, and the paths in it that the problems name.
WRONG_MEASUREMENTS = r"""
{"outcome": "OK", "units": 3} > outcome units
{"lower_limit": null} > lower_limit
{"upper_limit": true} > upper_limit
{"measured_value": NaN} > measured_value
{"measured_value": [1, [Infinity]]} > measured_value
{"validators": [{"outcome": "SKIP"}]} > validators[0].outcome
{"validators": {"operator": ">="}} > validators
{"x_axis": {"data": [1, "2"]}} > x_axis.data[1]
{"x_axis": {"data": [1, true]}} > x_axis.data[1]
{"x_axis": {"data": [1, -Infinity]}} > x_axis.data[1]
{"x_axis": {}} > x_axis.data
{"y_axis": [{"data": [0]}, 5]} > y_axis[1]
{"aggregations": [{"value": 1}]} > aggregations[0].type"""
# Fields of a create, and how the only problem begins.
WRONG_BODIES = r"""
{"outcome": "PASSED"} > outcome: 'PASSED' is not one of
{"procedure_id": ""} > procedure_id:
{"serial_number": ""} > serial_number:
{"part_number": "a b"} > part_number: the server takes
{"operated_by": " "} > operated_by: is empty
{"sub_units": ["ok", "\u00e9"]} > sub_units[1]:
{"started_at": "now"} > started_at:
{"started_at": "2026-05-19"} > started_at: give the
{"ended_at": "x"} > ended_at: 'x' is not a time: use 2026
{"ended_at": "25.1.2026"} > ended_at: '25.1.2026' is not a time: use 2026-01-25T08:00:00
{"ended_at": "25.11.2026 9:00"} > ended_at: '25.11.2026 9:00' is not a time: use 2026-11-25T08:00:00
{"ended_at": "25.11.2026 09:00"} > ended_at: '25.11.2026 09:00' is not a time: use 2026-11-25T09:00
{"ended_at": "2026-13-01T08:00:00Z"} > ended_at: '2026-13-01T08:00:00Z' is not a time: month
{"sub_units": ["A,B"]} > sub_units[0]: the server takes A-Z a-z 0-9 and _ . : + - only, not \
',': separate several with spaces
{"part_number": "a/b"} > part_number: the server takes A-Z a-z 0-9 and _ . : + - only, not \
'/': write _
{"metadata": {"a/b": 1}} > metadata.a/b: a key has 1 to 40 of A-Z a-z 0-9 and _ . : + -: write _
{"ended_at": 5} > ended_at: must be text, such as 2026
{"ended_at": "2026-05-19T09:59:59+02:00"} > ended_at: 2026-05-19T09:59:59+02:00 is before \
started_at, 2026-05-19T08:00:00Z
{"outcome": 1} > outcome: must be text, one of PASS
{"serial_number": 100} > serial_number: must be text: write "100"
{"started_at": "gestern"} > started_at: 'gestern' is not a time: use 2026-05-19T08:00:00+02:00, or Z
{"slot_key": "a"} > slot_key: needs execution_id
{"execution_id": "e", "slot_name": "a"} > slot_name: needs slot_key
{"docstring": "\udcff"} > docstring: is not text that UTF-8
{"client_run_ref": 5} > client_run_ref: must be text: write "5"
{"metadata": []} > metadata: must be a JSON object
{"metadata": null} > metadata: null
{"metadata": {"a": null}} > metadata.a: null deletes
{"metadata": {"a": {}}} > metadata.a: must be text
{"metadata": {"a b": 1}} > metadata.a b:
{"metadata": {"a": NaN}} > metadata.a:
{"unit_metadata": {"a": [1]}} > unit_metadata.a: must be text
{"phases": {}} > phases: must be a list
{"phases": [1]} > phases[0]: must be a JSON object
{"phases": [{"name": "p", "outcome": "PASS", "started_at": "2026-05-19T08:00:02Z", \
"ended_at": "2026-05-19T08:00:01Z"}]} > phases[0].ended_at: 2026-05-19T08:00:01Z is before
{"phases": [{"name": "p", "outcome": "PASS", "started_at": "2026-05-19T08:00:00Z", \
"ended_at": "2026-05-19T08:00:01Z", "sequence_path": "a"}]} > phases[0].sequence_path: no sequence
{"logs": [{"level": "LOUD", "timestamp": "2026-05-19T08:00:00Z", "message": "m", \
"source_file": "f", "line_number": 1}]} > logs[0].level:
{"logs": [{"level": "INFO", "timestamp": "2026-05-19T08:00:00Z", "message": "m", \
"source_file": "f", "line_number": 1.5}]} > logs[0].line_number: must be a whole
{"sequences": [{"path": "a/b", "name": "x", "outcome": "PASS"}]} > sequences[0].path: its parent a
{"sequences": [{"path": "a", "name": "A", "outcome": "PASS"}, \
{"path": "a", "name": "B", "outcome": "PASS"}]} > sequences[1].path: a is given twice
{"secrets": [{"key": "k", "value": "hush"}]} > secrets[0].value:
{"config": [{"key": "k", "value": [1]}]} > config[0].value: must be text"""
# The object, what people write in it, and the field that they mean.
ALMOST = """
run > part_numer part-number PartNumber partnumber prat_number > part_number
run > serial serial_nmbr > serial_number
run > start_time startedAt > started_at
run > end_time > ended_at
run > status Outcome outcom > outcome
phase > measurments measurement MEASUREMENTS mesaurements > measurements
phase > nme nmae > name
measurement > value measuredValue > measured_value
measurement > lowerLimit limit_low low_limit min low minimum LSL lower > lower_limit
measurement > limit_high high_limit uper_limt max high maximum usl upper > upper_limit
measurement > unit > units
validator > expected_vlaue value limit > expected_value"""
LOG = {"level": "INFO", "timestamp": BEGIN, "message": "m", "source_file": "f", "line_number": 1}
FAR = "colour operator_note fixture x1 nam3s_of_day id created_at".split()


# The same for what is a warning.
DOUBTS = """
{"outcome": "FAIL"} > outcome
{"validators": [{"outcome": "FAIL"}]} > validators[0].outcome
{"validators": [{"outcome": "FAIL", "is_decisive": false}]} >\x20
{"validators": [{"operator": "=>", "expected_value": 1}]} > validators[0].operator
{"y_axis": [{"data": [], "validators": [{"operator": "~"}]}]} > y_axis[0].validators[0].operator
{"measured_value": "3.3", "lower_limit": 3} > measured_value
{"measured_value": "3.3", "validators": [{"operator": "<", "expected_value": 4}]} > measured_value
{"measured_value": "1.4.0", "validators": [{"operator": "==", "expected_value": "1.4.0"}]} >\x20
{"measured_value": true, "lower_limit": 0, "upper_limit": 1} >\x20
{"measured_value": 0, "x_axis": {"data": [1]}} > measured_value
{"measured_value": 0, "y_axis": [{"data": [1]}]} > measured_value
{"y_axis": [{"data": [1]}], "x_axis": {"data": [1]}, "measured_value": null} >\x20
{"validators": [{"operator": ">="}, {"operator": "in"}]} > validators[0].expected_value
{"validators": [{"operator": "range", "expression": "1 to 2"}]} >\x20
{"measured_value": 4, "lower_limit": 5, "upper_limit": 3} > lower_limit
{"validators": [{"operator": "<", "expected_value": 3}, {"operator": ">", "expected_value": 5}]} \
> validators[1].expected_value
{"measured_value": 3, "validators": [{"operator": ">=", "expected_value": "3.1 V"}]} \
> validators[0].expected_value
{"measured_value": 3.5, "lower_limit": 3.1, "upper_limit": 3.4} > outcome
{"measured_value": 3, "validators": [{"operator": ">", "expected_value": 3}]} > outcome
{"measured_value": 3, "validators": [{"operator": ">=", "expected_value": 3}]} >\x20
{"outcome": "UNSET", "measured_value": 3, "lower_limit": 4} >\x20
{"measured_value": 3, "validators": [{"operator": ">", "expected_value": 4, \
"is_decisive": false}]} >\x20
"""


class Checks(unittest.TestCase):
    """Whether a request is right, with all problems at once and their paths."""

    def has_one_problem(self, fields, begin):
        """A create with these fields has one problem, which begins so."""
        problems = problems_of(dict(BODY, **fields))
        self.assertEqual(len(problems), 1, (fields, problems))
        self.assertTrue(problems[0].startswith(begin), (begin, problems))

    def test_each_wrong_field_of_a_create_is_a_problem_with_its_path(self):
        for text, begin in cells_of(WRONG_BODIES):
            self.has_one_problem(json.loads(text), begin)

    def test_letters_that_the_server_does_not_take_are_told_with_what_to_write(self):
        """Control: say letters, which an umlaut is."""
        for fields in ({"batch_number": "L\xfc"}, {"metadata": {"pr\xfcfer": 1}}):
            problem, = problems_of(dict(BODY, **fields))
            self.assertRegex(problem, "A-Z a-z.* write ue for \xfc")

    def test_what_is_too_long_or_too_much_is_a_problem_with_its_path(self):
        many = {f"k{number}": number for number in range(51)}
        self.has_one_problem({"metadata": many}, "metadata: has 51 keys")
        self.has_one_problem({"metadata": {"k": 50001 * "x"}}, "metadata.k: is longer")
        self.has_one_problem({"metadata": {41 * "k": 1}}, "metadata." + 41 * "k")
        self.has_one_problem({"serial_number": 61 * "x"}, "serial_number: has 61")
        self.assertEqual(problems_of(dict(BODY, serial_number=60 * "x")), [])

    def test_each_wrong_field_of_a_measurement_is_a_problem_with_its_path(self):
        for text, names in cells_of(WRONG_MEASUREMENTS):
            body = body_with(json.loads(text))
            paths = [problem.split(": ")[0] for problem in problems_of(body)]
            expected = [f"{MEASUREMENT_PATH}.{name}" for name in names.split()]
            self.assertEqual(paths, expected, text)

    def test_series_of_unequal_length_are_a_problem(self):
        """Control: leave the comparison of the axes out."""
        axes = {"x_axis": {"data": [1, 2, 3]}, "y_axis": [{"data": [1, 2, 3]}, {"data": [1, 2]}]}
        problem, = problems_of(body_with(axes))
        self.assertTrue(problem.startswith(MEASUREMENT_PATH + ".y_axis[1]"), problem)
        axes["y_axis"].pop()
        self.assertEqual(problems_of(body_with(axes)), [])

    def doubts(self, body):
        """The paths of the warnings about a body that has no problem."""
        findings = runs.examine("create", body)[1]
        self.assertEqual(findings.problems, [])
        return [warning.split(": ")[0] for warning in findings.warnings]

    def test_a_number_that_is_text_is_told_with_how_to_write_it(self):
        """Control: leave a line of number_meant out, or take a wider pattern."""
        for value, advice in (
                ("3,31", ": write 3.31, with a decimal point"), ("OK", ""), ("1.4.0", ""),
                ("-3.31 V", ": write -3.31, and V as units"),
                ("3.1", ": write 3.1, without quotes"),
                ("12\xb0C", ": write 12, and \xb0C as units"), ("00042", ""), ("1e3", "")):
            body = body_with({"measured_value": value, "upper_limit": 4})
            warning, = runs.examine("create", body)[1].warnings
            reason = "is text, and its limits are numbers" + advice
            self.assertTrue(warning.endswith(reason), (value, warning))

    def test_what_the_server_takes_and_nobody_means_is_a_warning(self):
        """Control: leave warn_of_operator, or one of the warnings of warn_of_limits, out."""
        for text, names in cells_of(DOUBTS):
            expected = [f"{MEASUREMENT_PATH}.{name}" for name in names.split()]
            self.assertEqual(self.doubts(body_with(json.loads(text))), expected, text)
        for operator in runs.OPERATORS:
            rule = {"operator": operator, "expected_value": 1, "outcome": "PASS"}
            self.assertEqual(self.doubts(body_with({"validators": [rule]})), [])

    def test_a_phase_that_failed_in_a_run_that_passed_is_a_warning_unless_it_was_repeated(self):
        """Control: take every failed phase for a contradiction."""
        first = body_with()["phases"][0]
        failed = dict(first, name="q", outcome="ERROR")
        body = dict(BODY, phases=[first, failed])
        self.assertEqual(self.doubts(body), ["phases[1].outcome"])
        self.assertEqual(self.doubts(dict(body, outcome="FAIL")), [])
        body["phases"].append(dict(failed, outcome="PASS", retry_count=1))
        self.assertEqual(self.doubts(body), [])

    def test_a_phase_more_than_a_day_apart_from_its_run_is_a_warning(self):
        """Control: leave either of the two comparisons out."""
        for name, near, far in (("started_at", "2026-05-18T08:00:01Z", "2026-05-18T07:59:59Z"),
                                ("ended_at", "2026-05-20T08:00:41Z", "2026-05-20T08:00:43Z")):
            phase = body_with()["phases"][0]
            self.assertEqual(self.doubts(dict(BODY, phases=[dict(phase, **{name: near})])), [])
            body = dict(BODY, phases=[dict(phase, **{name: far})])
            self.assertEqual(self.doubts(body), [f"phases[0].{name}"])

    def test_doubts_of_one_kind_are_told_once(self):
        """Control: name the value in the warning."""
        body = body_with()
        body["phases"][1]["measurements"] = [
            {"name": "m", "outcome": "PASS", "measured_value": number, "lower_limit": number + 1}
            for number in range(9)]
        warnings = runs.examine("create", body)[1].warnings
        self.assertEqual(len(runs.group_issues(warnings)), 1, warnings)

    def test_all_problems_are_told_at_once_and_those_of_the_top_level_first(self):
        """Control: leave the sort out."""
        body = body_with({"outcome": "OK"}, logs=[{"level": "INFO"}])
        body = {"logs": body["logs"], "phases": body["phases"], "outcome": "NO", "started_at": "x"}
        paths = [problem.split(": ")[0] for problem in problems_of(body)]
        self.assertEqual(paths[:5], ["outcome", "started_at", "procedure_id", "serial_number",
                                     "ended_at"])
        self.assertEqual(paths[5:], ["logs[0].timestamp", "logs[0].message", "logs[0].source_file",
                                     "logs[0].line_number", MEASUREMENT_PATH + ".outcome"])

    def body_with_field(self, place, name):
        """A body that has a field of this name in a run, phase, measurement or validator."""
        body = body_with()
        phase = body["phases"][1]
        row = phase["measurements"][0]
        row["validators"] = [{}]
        inner = {"run": body, "phase": phase, "measurement": row, "validator": row["validators"][0]}
        inner[place][name] = 1
        return body

    def test_a_field_that_is_nearly_a_known_one_is_a_problem_at_any_depth(self):
        """Control: take the unknown for a field of a newer server."""
        for place, words, meant in cells_of(ALMOST):
            for word in words.split():
                problems = problems_of(self.body_with_field(place, word))
                self.assertEqual(len(problems), 1, (word, problems))
                self.assertRegex(problems[0], f"(^|[.]){word}: .*did you mean {meant}\\?$")

    def test_a_field_of_a_newer_server_is_sent_on_with_a_warning_that_names_its_path(self):
        """Control: refuse what the table does not know, or say nothing."""
        for word in FAR:
            body = body_with({word: [1]})
            body[word] = {"a": 1}
            wire, findings = runs.examine("create", body)
            self.assertEqual(findings.problems, [], word)
            paths = [warning.split(": ")[0] for warning in findings.warnings]
            expected = [word, f"{MEASUREMENT_PATH}.{word}"]
            self.assertEqual(sorted(paths), sorted(expected))
            self.assertEqual(wire[word], {"a": 1})
            row = wire["phases"][1]["measurements"][0]
            self.assertEqual(row[word], [1])

    def test_what_is_wrong_in_an_unknown_field_is_a_problem_all_the_same(self):
        problem, = problems_of(dict(BODY, colour=[{"x": math.nan}]))
        self.assertTrue(problem.startswith("colour: "), problem)

    def test_fields_that_get_returns_are_no_problem(self):
        """Control: take `procedure`, `duration` or `data_series` for a slip."""
        for record, names in (
                (runs.CREATE, "id created_at duration procedure unit created_by_user "
                 "created_by_station attachments"),
                (runs.PHASE, "id duration"), (runs.SEQUENCE, "id key parent_path duration"),
                (runs.MEASUREMENT, "id data_series"), (runs.LOG, "id"),
                (runs.AGGREGATION, "id"), (runs.VALIDATOR, "is_expression_only "
                 "analytics_expression has_custom_expression")):
            for name in names.split():
                findings = runs.Findings()
                runs.check_record(record, {name: 1}, "", findings)
                others = [text for text in findings.problems if not text.endswith(": missing")]
                self.assertEqual(others, [])
                self.assertTrue(findings.warnings[0].startswith(f"{name}: unknown field"))

    def test_a_null_source_of_config_and_secrets_is_taken(self):
        """Control: leave null out of SECRET's source."""
        body = dict(BODY, config=[{"key": "k", "value": 1, "source": None}],
                    secrets=[{"key": "s", "source": None, "version": None}])
        self.assertEqual(problems_of(body), [])

    def test_json_that_is_nested_too_deep_is_a_problem_and_no_bug(self):
        """Control: leave require_shallow out."""
        deep = 1
        for _ in range(900):
            deep = [deep]
        for fields in ({"colour": deep}, {"metadata": {"a": deep}}, {"phases": [deep]},
                       body_with({"measured_value": deep})):
            self.assertEqual(len(problems_of(dict(BODY, **fields))), 1)

    def test_enums_are_taken_in_any_case(self):
        body = body_with({"outcome": "fail"}, outcome="pass")
        wire = runs.examine("create", body)[0]
        self.assertEqual(wire["outcome"], "PASS")
        self.assertEqual(wire["phases"][1]["measurements"][0]["outcome"], "FAIL")

    def dumps_of(self, body):
        """How often the checks and the reference of a body call json.dumps."""
        with mock.patch.object(runs.json, "dumps", wraps=json.dumps) as dumps:
            runs.with_ref(runs.check("create", body))
        return dumps.call_count

    def test_numbers_of_a_long_series_cost_no_call_each(self):
        """Control: check the numbers of an axis one by one, or dump each."""
        floats = [float(number) for number in range(5000)]
        axes = {"x_axis": {"data": floats}, "y_axis": [{"data": list(range(5000))}]}
        with mock.patch.object(runs, "check_number", lambda *_: self.fail("one by one")):
            self.assertLess(self.dumps_of(body_with(axes)), 20)

    def test_many_measurements_cost_no_dump_each(self):
        """Control: dump each number to see whether JSON knows it."""
        limit = {"operator": ">=", "expected_value": 1.0, "outcome": "PASS"}
        body = body_with({"measured_value": 1.5, "lower_limit": 1, "validators": [limit]})
        body["phases"][1]["measurements"] *= 500
        self.assertLess(self.dumps_of(body), 20)

    def test_unknown_fields_of_many_measurements_are_compared_once(self):
        """Control: nearly_known without its cache."""
        runs.nearly_known.cache_clear()
        body = body_with({"colour": 1})
        body["phases"][1]["measurements"] *= 300
        with mock.patch.object(runs, "bare_letters", wraps=runs.bare_letters) as bare_letters:
            findings = runs.examine("create", body)[1]
        self.assertEqual(len(findings.warnings), 300)
        self.assertEqual(bare_letters.call_count, 1 + len(runs.MEASUREMENT.names))

    def test_a_key_that_is_no_text_is_a_problem(self):
        """Control: take it for a field of a newer server. The ref cannot sort such keys."""
        body = body_with()
        body["phases"][1]["measurements"][0].update({1: 2, None: 3})
        findings = runs.examine("create", body)[1]
        path = MEASUREMENT_PATH + "."
        self.assertEqual(findings.problems, [path + "1: a key must be text",
                                             path + "None: a key must be text"])

    def test_problems_of_one_kind_are_told_once_with_their_count(self):
        """Control: leave group_issues out of the text of an error."""
        body = body_with()
        body["phases"][1]["measurements"] = [{"name": "m"}] * 300
        with self.assertRaises(runs.BadInput) as caught:
            runs.check("create", body)
        issues = caught.exception.as_json()["issues"]
        self.assertEqual(len(issues), 300)
        text = runs.group_issues(issues)
        times = [f"logs[{number}].timestamp: '{number}' is not a time" for number in range(9)]
        self.assertEqual(len(runs.group_issues(times)), 1)
        names = [f'logs[0].message: must be text: write "{number}"' for number in range(9)]
        self.assertEqual(len(runs.group_issues(names)), 1)
        orders = [f"ended_at: 2026-05-19T0{number}:00:00.5Z is before" for number in range(9)]
        self.assertEqual(len(runs.group_issues(orders)), 1)
        self.assertEqual(text, [MEASUREMENT_PATH + ".outcome: missing (and 299 more like it)"])

    @in_new_york
    def test_a_local_time_in_the_hour_that_autumn_has_twice_is_not_before_its_begin(self):
        """Control: leave local_reading out."""
        day = "2026-11-01T"
        first, second = day + "01:59:00", day + "01:01:10"
        phase = {"name": "p", "outcome": "PASS", "started_at": first, "ended_at": second}
        late = dict(phase, started_at=second, ended_at=day + "01:01:30")
        log = dict(LOG, timestamp=day + "01:00:30")
        begin = day + "01:58:30"
        body = dict(BODY, started_at=begin, ended_at=second, phases=[phase, late], logs=[log])
        for names in (list(body), list(body)[::-1]):    # whatever stands first
            wire, findings = runs.examine("create", {name: body[name] for name in names})
            self.assertEqual(findings.problems, [])
            self.assertEqual(wire["started_at"], begin + "-04:00")
            self.assertEqual(wire["ended_at"], second + "-05:00")
            self.assertEqual(wire["phases"][0]["started_at"], first + "-04:00")
            self.assertEqual(wire["phases"][0]["ended_at"], second + "-05:00")
            self.assertEqual(wire["phases"][1]["started_at"], second + "-05:00")
            self.assertEqual(wire["logs"][0]["timestamp"], day + "01:00:30-05:00")
        problems = problems_of(dict(body, ended_at=day + "00:30:00"))
        self.assertRegex(problems[0], "ended_at: .*is before started_at")
        written = dict(BODY, started_at=begin + "-04:00", ended_at=second + "-04:00")
        self.assertRegex(problems_of(written)[0], "ended_at: .*is before started_at")

    def test_the_reference_of_a_content_is_the_same_for_ever(self):
        text = json.dumps(BODY, sort_keys=True, separators=(",", ":"))
        self.assertEqual(hashlib.sha256(text.encode()).hexdigest(), PLAIN_REF)
        full = json.loads(json.dumps(dict(BODY, **FULL)))
        full["phases"][0]["measurements"][1]["y_axis"][0]["data"] = []
        phases = [dict(full["phases"][0], started_at="2026-05-19T06:00:00.50Z")]
        local = dict(sorted(BODY.items()), started_at="2026-05-19T10:00:00.0+02:00")
        for body, ref in (
                (full, FULL_REF),
                (dict(full, phases=phases), FULL_REF),
                (local, PLAIN_REF)):
            self.assertEqual(runs.run_ref(body), ref)
        for change in (
                {"outcome": "FAIL"},
                {"docstring": ""},
                {"metadata": {"a": 1}},
                {"ended_at": "2026-05-19T08:00:42.001Z"},
                {"newer": 1}):
            self.assertNotEqual(runs.run_ref(dict(BODY, **change)), PLAIN_REF, change)

    def test_the_hash_of_a_text_is_the_same_whoever_makes_it(self):
        """Short texts by Python's own module, long ones and all without it by hashlib.

        Control: let ImportError out of sha256_of_text.
        """
        for length in (0, 1, runs.BLOCK, runs.BLOCK + 1):
            text = "a" * length
            expected = hashlib.sha256(text.encode()).hexdigest()
            self.assertEqual(runs.sha256_of_text(text), expected)
            with mock.patch.dict(sys.modules, {"_sha2": None, "_sha256": None}):
                self.assertEqual(runs.sha256_of_text(text), expected)

    def test_the_reference_is_made_of_times_that_cannot_be_parsed_as_they_are_written(self):
        """Control: let run_ref raise."""
        odd = dict(BODY, started_at="0001-01-01T00:00:00+14:00", ended_at=None)
        text = json.dumps(odd, sort_keys=True, separators=(",", ":"))
        self.assertEqual(runs.run_ref(odd), hashlib.sha256(text.encode()).hexdigest())

    def test_only_a_row_that_agrees_in_all_it_shows_is_the_same_run(self):
        row = {"outcome": "PASS", "procedure": {"id": "proc_abc", "version": None}, "unit": {
            "serial_number": "sn-0001", "part": {"number": "P", "revision": {"number": "A"}},
            "batch": None}, "started_at": "2026-05-19T08:00:00.000Z", "docstring": None,
            "ended_at": "2026-05-19T08:00:42.000Z", "operated_by": None, "metadata": {}}
        self.assertTrue(runs.is_same_run(row, BODY))
        self.assertTrue(runs.is_same_run(row, dict(BODY, part_number="p")))
        for theirs in (
                {"operated_by": {"name": "x", "email": None}},
                {"outcome": "FAIL"},
                {"docstring": "x"},
                {"metadata": {"a": 1}},
                {"slot_key": "s"},
                {"ended_at": "2026-05-19T08:00:42.002Z"},
                {"started_at": None},
                {"procedure": {"id": "proc_abc", "version": {"tag": "1"}}}):
            self.assertFalse(runs.is_same_run(dict(row, **theirs), BODY), theirs)
        for ours in (
                {"part_number": "Q"},
                {"batch_number": "b"},
                {"execution_id": "e"},
                {"procedure_version": "1"},
                {"operated_by": "x"},
                {"metadata": {"a": 1}}):
            self.assertFalse(runs.is_same_run(row, dict(BODY, **ours)), ours)


# ---- tests: login --------------------------------------------------------------------------------

class LoginFound(Case):
    """Which server and which key. Where a key may go is held by Secrets."""

    def login_file(self, **fields):
        """A credentials file in the home, and an environment that names nothing."""
        folder = self.env["TOFUPILOT_HOME"]
        os.makedirs(folder, exist_ok=True)
        fields = dict({"api_key": self.box.user_key, "base_url": self.box.url}, **fields)
        path = save(os.path.join(folder, "credentials.json"), json.dumps(fields).encode())
        os.chmod(path, 0o600)
        self.env.update(TOFUPILOT_URL="", TOFUPILOT_API_KEY="")
        return path

    def test_quotes_around_a_key_and_a_url_are_taken_off(self):
        """Control: leave the quotes of cmd's set in environment()."""
        for mark in "\"'":
            env = {}
            for name in ("TOFUPILOT_URL", "TOFUPILOT_API_KEY"):
                env[name] = mark + self.env[name] + mark
            self.ok("ls", env=env)
            quoted_key = env["TOFUPILOT_API_KEY"]
            path = self.file("key", quoted_key.encode())
            self.ok("ls", "--api-key-file", path, env={"TOFUPILOT_API_KEY": ""})
            serial = f"Q{ord(mark)}"
            env["TOFUPILOT_QUEUE"] = f"{mark}my.queue{mark}"
            self.ok(*create(serial, "--offline"), env=env)
        self.assertIn("my.queue", os.listdir(self.folder))

    def test_the_private_ca_of_the_credentials_file_is_used(self):
        """Control: leave ca_cert out of the Login."""
        ca = self.file("ca.pem", b"no certificate")
        self.login_file(ca_cert=ca)
        ran = self.fails(2, "check")
        self.assertIn("FAIL  ca ", ran.out)
        self.assertIn(ca, ran.out)
        with mock.patch.dict(os.environ, self.env):
            for given, expected in ((None, ca), ("mine.pem", "mine.pem")):
                client = runs.Client(ca_cert=given)
                self.assertEqual(client.login.ca_cert, ca)
                self.assertEqual(client.transport.ca_cert, expected)
                self.assertEqual(client.clone().transport.ca_cert, expected)
        self.login_file(ca_cert=None)
        self.ok("ls")

    def test_a_key_file_of_any_editor_is_read_and_a_key_in_its_place_is_not_shown(self):
        key = self.box.user_key
        self.env["TOFUPILOT_API_KEY"] = ""
        for encoding in utf_encodings():
            path = self.file("key", (key + "\r\n").encode(encoding))
            self.ok("ls", "--api-key-file", path)
        for odd in (key, key[:20] + "/" + key[20:], "." + key, key + ".txt"):
            ran = self.fails(3, "ls", "--api-key-file", odd)
            self.assertNotIn(key[20:], ran.err)

    def test_a_key_from_stdin_is_read_once_also_for_two_clients(self):
        self.env["TOFUPILOT_API_KEY"] = ""
        for more in ((), QUEUE):
            self.ok(*create("K", "--api-key-file", "-", *more), input=self.box.user_key.encode())

    def test_no_key_is_told_with_all_places_that_were_looked_at(self):
        ran = self.fails(3, "ls", env={"TOFUPILOT_API_KEY": ""})
        for word in ("TOFUPILOT_API_KEY", "--api-key-file", "credentials.json", "station.json"):
            self.assertIn(word, ran.err)


# ---- tests: requests on the wire -----------------------------------------------------------------

ODD_WORDS = ["a+b", "a&b=c", "a,b", "50%", "a/b", "x y", WORLD, "#?;", "'\"\\"]
TEXT_FILTERS = ("--procedure-versions --execution-ids --slot-keys --slot-names --serial-numbers "
                "--part-numbers --revision-numbers --batch-numbers --operated-by-names").split()
ID_FILTERS = ("--ids --procedure-ids --deployment-ids --created-by-user-ids "
              "--created-by-station-ids --operated-by-ids").split()
METADATA_FILTER = '{"s": {"in": ["A", "\\u00e9&"]}, "n": {"gte": 1.5}, "b": {"eq": true}}'
OTHER_FILTERS = (   # the flag, the words after it, and the values that they send
    ("--outcomes", "Pass Fail error TIMEOUT aborted", "PASS FAIL ERROR TIMEOUT ABORTED"),
    ("--samples", "Production golden failing,IGNORED", "production golden failing ignored"),
    ("--environments", "production preview,development", "production preview development"),
    ("--sort-by", "Duration", "duration"), ("--sort-order", "ASC", "asc"),
    ("--search-query", "a+b&c,%/", "a+b&c,%/"), ("--limit", "37", "37"), ("--cursor", "7", "7"),
    ("--duration-min", "PT1M30S", "PT1M30S"), ("--duration-max", "1h30m", "PT5400S"),
    ("--started-after", "2026-05-19T10:00:00.123456+0200", "2026-05-19T10:00:00.123456+02:00"),
    ("--started-before", "2026-05-19T08:00Z", "2026-05-19T08:00:00Z"),
    ("--ended-after", "2026-05-19T08:00:00-03:30", "2026-05-19T08:00:00-03:30"),
    ("--ended-before", "2026-12-19T08:00:00,5+05", "2026-12-19T08:00:00.5+05:00"),
    ("--created-after", "2026-07-19T08:00:00", "2026-07-19T08:00:00-04:00"),    # EDT
    ("--created-before", "2026-01-19", "2026-01-19T00:00:00-05:00"),
    ("--include-metadata", "", "true"), ("--include-sequences", "false", "false"))


def filter_lines():
    """(flag, words, values) of each filter of ls."""
    lines = [(flag, ODD_WORDS, ODD_WORDS) for flag in TEXT_FILTERS]
    lines += [(flag, [NOBODY, "proc_abc"], [NOBODY, "proc_abc"]) for flag in ID_FILTERS]
    lines += [(flag, words.split(), values.split()) for flag, words, values in OTHER_FILTERS]
    return lines + [("--metadata", [METADATA_FILTER], [METADATA_FILTER])]


def words_of(values):
    """The flags of a create that give these values."""
    for name, value in values.items():
        yield runs.flag_name(name)
        is_list_of_texts = isinstance(value, list) and isinstance(value[0], str)
        for word in value if is_list_of_texts else [value]:
            yield word if isinstance(word, str) else json.dumps(word)


class RequestsOnTheWire(Case):
    """What each command line sends. It was compared once with what the official SDK sends."""

    def test_each_filter_of_ls_goes_out_once_with_its_exact_value(self):
        args, pairs, flags = [], [], set()
        for flag, words, values in filter_lines():
            flags.add(flag)
            args.append(flag)
            args += words
            name = flag[2:].replace("-", "_")
            pairs += [(name, value) for value in values]
        self.assertEqual(flags, set(map(flag_of, LIST)))
        self.run_script("ls", *args, env={"TZ": NEW_YORK})
        request, = self.sent()
        method, path, query, body = request
        self.assertEqual(method, "GET")
        self.assertEqual(path, "/v2/runs")
        self.assertIsNone(body)
        self.assertEqual(sorted(query), sorted(pairs))

    def test_a_create_sends_each_field_as_it_was_given(self):
        names = set(FULL) | set(BODY)
        self.assertEqual(names, set(runs.CREATE.names))
        body = dict(BODY, **FULL)
        self.run_script(*CREATE, *words_of(FULL))
        self.assertEqual(self.sent(), [("POST", "/v2/runs", [], body)])
        for name, value in (("newer_field", [1]), ("deployment_id", None)):
            body = dict(BODY)
            body[name] = value
            self.inside("create", "--body", json.dumps(body))
            _, _, _, sent = self.sent("POST")[0]
            self.assertEqual(sent[name], value)

    def other_operations(self, odd):
        """(command line, method, path, query, body) of the operations other than list and create.

        `odd` is an ID that has to be percent-encoded.
        """
        path = "/v2/runs/" + quote(odd, safe="")
        upload_path = "/v2/attachments/" + quote(odd, safe="")
        words = ["--metadata", '{"a":null,"b":1.0,"c":"x"}', "--set", "d=true", "e=1.10",
                 "--set", "f=007", "b=2", 'g="1.1"', "h=a=b", "i=-3", "--unset", "j", "k"]
        metadata = {"a": None, "b": 2, "c": "x", "d": True, "e": "1.10", "f": "007", "g": "1.1",
                    "h": "a=b", "i": -3, "j": None, "k": None}
        links = {"attachments": ["a,b", odd]}
        name = f"{WORLD}.pdf"
        ids = [("ids", odd), ("ids", "b,c")]
        return (
            (["get", "--id", odd], "GET", path, [], None),
            (["get", odd], "GET", path, [], None),
            (["update", "--id", odd], "PATCH", path, [], {}),
            (["update", odd, "--attachments", "a,b", odd], "PATCH", path, [], links),
            (["update-metadata", odd] + words, "PATCH", path + "/metadata", [],
             {"metadata": metadata}),
            (["create-attachment", "--id", odd, "--name", name], "POST", path + "/attachments",
             [], {"name": name}),
            (["rm", "--yes", "--ids", odd, "b,c"], "DELETE", "/v2/runs", ids, None),
            (["rm", odd, "b,c"], "DELETE", "/v2/runs", ids, None),
            (["attachments", "initialize", "--name", "a+b &.pdf"], "POST", "/v2/attachments", [],
             {"name": "a+b &.pdf"}),
            (["attachments", "finalize", "--id", odd], "POST", upload_path + "/finalize", [],
             None),
            (["check"], "GET", "/v2/whoami", [], None))

    def test_the_other_operations_send_method_path_query_and_body(self):
        """Control: join the ID into the path as it is."""
        self.assertEqual(quote("a/b ?%\u00b5+&", safe=""), "a%2Fb%20%3F%25%C2%B5%2B%26")
        for odd in "a/b ?%\u00b5+&", "../x", "a#b", "a\nb", "%2e%2e", "..\\x", "...":
            for line, *expected in self.other_operations(odd):
                self.inside(*line)
                has_body = expected[3] is not None
                headers = self.box.requests[0].headers
                self.assertEqual(headers["authorization"], "Bearer " + self.box.user_key)
                self.assertEqual(headers["accept"], "application/json")
                self.assertEqual(headers.get("content-type"),
                                 "application/json" if has_body else None, line)
                self.assertEqual(self.sent(), [tuple(expected)], line)

    def same_requests(self, first, *others):
        """All these command lines send the same."""
        for line in others:
            self.inside(*first.split())
            self.inside(*line.split(), input=b"\xef\xbb\xbfSN-1\nSN-2\n")
            one, two = self.sent()
            self.assertEqual(one, two, line)

    def test_flags_stand_anywhere_and_list_flags_are_repeated_in_the_singular_too(self):
        self.same_requests(
            "ls --serial-numbers SN-1 SN-2", "runs ls --serial-numbers SN-1 SN-2",
            "--retries 0 -v ls --serial-numbers SN-1 SN-2", "ls --serial-numbers -",
            "ls --serial-numbers SN-1 SN-2 -qv --retries=0",
            "ls --serial-number SN-1 --serial-numbers SN-2",
            "ls --serial-numbers=SN-1 --serial-number=SN-2")
        self.same_requests("ls --serial-numbers=-A1", "ls --serial-number=-A1")
        self.same_requests("rm --yes --ids SN-1 SN-2", "rm --ids -", "rm -", "rm SN-1 SN-2")
        self.same_requests("ls --outcomes FAIL ERROR --sort-by outcome",
                           "runs ls --outcome fail --outcomes Error --sort-by OUTCOME",
                           "ls --outcomes FAIL,ERROR --sort-by outcome",
                           "ls --outcomes fail,Error, --sort-by outcome")

    def test_lists_are_read_in_every_encoding_with_any_line_end(self):
        """Control: read the list as UTF-8, or keep Ctrl-Z."""
        line = "rm --ids @ids.txt"
        for encoding in utf_encodings():
            for text in ("SN-1\r\n\n  SN-\u00e9 \n", "SN-1\rSN-\u00e9", "SN-1\nSN-\u00e9\r\n\x1a"):
                self.file("ids.txt", text.encode(encoding))
                for words in (line, "rm @ids.txt", "ls --serial-numbers @ids.txt"):
                    self.inside(*words.split())
                    query = self.sent()[0][2]
                    values = [value for name, value in query if name != "limit"]
                    self.assertEqual(values, ["SN-1", "SN-\u00e9"], (encoding, words))

    def test_json_of_a_file_in_any_encoding_and_words_of_set_are_one_request(self):
        line = f"update-metadata {NOBODY} --metadata "
        self.file("m8.json", '{"s": "\u00e9"}'.encode("utf-8-sig"))
        self.file("m16.json", '{"s": "\u00e9"}\x1a'.encode("utf-16"))
        self.same_requests(line + '{"s":"\u00e9"}', line + "@m8.json", line + "@m16.json",
                           f"update-metadata --id {NOBODY} --set s=\u00e9")


# ---- tests: transport ----------------------------------------------------------------------------

STATUSES = {400: 5, 401: 3, 403: 3, 404: 4, 408: 6, 409: 5, 413: 5, 415: 5, 422: 5, 425: 6,
            429: 6, 500: 6, 502: 6, 503: 6, 504: 6}
FOREIGN_ANSWERS = (
        (404, b"<html>"),
        (400, b'{"no": "reason"}'),
        (204, b""),
        (200, b""),
        (200, b"null"),
        (200, b"[" * 200000),
        (200, b'{"data":' + b"[" * 100000),
        (200, b"[]"),
        (200, b'[{"id": "x"}]'),
        (200, b'"text"'),
        (200, b'{"id": 7}'),
        (200, b'{"id": ""}'),
        (200, b'{"id": "x"'),
        (200, b'{"id": "x", "n": NaN}'),
        (200, b'{"id": "\xff"}'),
        (400, b'{"message": "%s"}' % (b"x" * 70000)),
        (200, b'{"id": "%s"}' % (b"x" * (66 << 20))))
PASSING_FAULTS = (
        ("drop-before", {}),
        ("drop-after", {}),
        ("reset", {}),
        ("cut", {}),
        ("status", {"status": 503}),
        ("status", {"status": 429}),
        ("status", {"status": 408}),
        ("status", {"status": 425}),
        ("status", {"status": 500, "body": b"<html>"}),
        ("status", {"status": 502, "body": b""}))


class Answers(Case):
    """What an answer means, whether it is the API's, and what is tried again."""

    def test_each_status_of_the_server_has_its_exit_status(self):
        issue = {"message": "wrong", "path": ["phases", 1, "name"]}
        body = {"message": "Because\x1b", "code": "WORD", "issues": [issue]}
        for status, expected in STATUSES.items():
            self.box.fault("status", status=status, body=body)
            ran = self.fails(expected, "get", "--id", NOBODY, *ONCE, "--json")
            error = ran.error
            self.assertEqual(error["status"], status)
            self.assertEqual(error["code"], "WORD")
            self.assertEqual(error["exit_code"], expected)
            self.assertEqual(error["issues"], ["phases[1].name: wrong"])
            self.assertIn("Because", error["message"])
            self.assertNotIn(self.box.user_key, ran.err)

    def test_what_is_not_the_api_ends_with_6_and_is_not_tried_again(self):
        """Control: take every JSON, or every 4xx, for the API's."""
        for status, body in FOREIGN_ANSWERS:
            self.says(ANY, body, status)
            for line in (["get", NOBODY], CREATE):
                self.assertLess(len(self.fails(6, *line).err), 1000)
                self.assertEqual(len(self.sent()), 1, (status, body[:99]))
        self.says(ANY, b'{"id": "x"}', Content_Type="text/html")
        self.fails(6, "get", NOBODY)

    def test_numbers_that_no_float_holds_do_not_stop_an_answer(self):
        self.says(ANY, b'{"id": "x", "n": 1e999, "m": -1e999}')
        self.assertEqual(self.ok("get", NOBODY, "--json").json["n"], "Infinity")

    def test_some_statuses_are_believed_without_json(self):
        """Control: ask for JSON in every error."""
        page = b"<html>too much</html>"
        for status in (408, 425, 429, 500, 502, 413):
            self.says("GET /v2/runs", page, status, Content_Type="text/html")
            ran = self.fails(STATUSES[status], "ls", *ONCE, "--json")
            self.assertEqual(ran.error["status"], status)
        self.assertIn("too large", ran.error["message"])
        self.says("GET /v2/runs", page, status=414, Content_Type="text/html")
        ran = self.fails(5, "ls", "--ids", "a", "b")
        self.assertIn("fewer values", ran.err)

    def test_a_failed_try_is_announced_and_repeated_where_that_is_safe(self):
        """Control: take one of these statuses out of those that are tried again."""
        run_id = self.made()
        path = self.file("a.txt")
        places = (
                ("GET /v2/runs", ["ls"]),
                ("PATCH /v2/runs/{id}", ["update", run_id]),
                ("PUT /storage/{id}", ["create-attachment", run_id, "--file", path]))
        for number, (kind, options) in enumerate(PASSING_FAULTS):
            for place, line in places:
                if kind == "cut" and place.startswith("PUT"):
                    continue        # its answer has no body to cut
                self.file("a.txt", b"%d" % number)
                self.box.calm()
                self.box.fault(kind, place, times=3, **options)
                ran = self.ok(*line)        # the first of a kept connection is silent
                self.assertIn(ran.err.count("next try in"), (2, 3), (kind, options, ran))
                self.file("a.txt", b"again %d" % number)
                self.box.fault("status", place)
                self.assertEqual(self.ok("--json", *line).err, "")

    def test_retries_are_tries_after_the_first(self):
        for retries, count in ((0, 1), (1, 2), (4, 5)):
            self.box.fault("status", "GET /v2/runs", times=None)
            ran = self.fails(6, "ls", "--retries", str(retries))
            self.assertEqual(len(self.sent()), count)
            self.assertEqual(f"({count} tries in" in ran.err, count > 1)

    def test_a_kept_connection_that_died_is_opened_anew_in_silence(self):
        """Control: leave the free try out."""
        client = self.client(retries=0, notify=self.fail)
        client.list()
        self.box.fault("drop-before", "GET /v2/runs")
        client.list()
        self.assertEqual(self.box.connections, 2)
        self.assertEqual(len(self.sent()), 3)

    def test_where_nobody_is_surely_nothing_was_sent(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ran = self.fails(6, "ls", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
        self.assertIn("nothing was sent", ran.err)
        self.assertIn("4 tries", ran.err)

    def test_a_trace_has_a_line_for_each_request(self):
        lines = self.ok("ls", "-v", "--outcomes", "PASS").err.splitlines()
        self.assertEqual(len(lines), 1 + 1)     # and that no run matches
        self.assertRegex(lines[0], r"^GET \S*/v2/runs\?outcomes=PASS&limit=50 200 \d+ ms$")
        self.box.fault("drop-before", "GET /v2/runs", times=None)
        self.assertRegex(self.fails(6, "ls", "-v", *ONCE).err, r"GET \S+ \w+ \d+ ms\n")


    def test_a_url_without_a_path_and_an_odd_issue_are_no_bug(self):
        """Control: take a URL apart by its slashes; take the place in an issue as it is."""
        self.assertEqual(runs.shown_url("https://s3.example.com?sig=1"), "")
        self.says("DELETE /v2/runs", {"message": "no", "issues": [
            {"path": ["ids", 7], "message": "is not an ID"}]}, status=400)
        self.fails(5, "rm", "a", "--yes")


class Waits(Case):
    """How long is waited between two tries."""

    def delays(self, *args):
        """The shortest and the longest wait that delay can give."""
        found = []
        for share in (0, 1):
            def uniform(low, high, share=share):
                return low + share * (high - low)
            with mock.patch.object(random, "uniform", uniform):
                found.append(runs.delay(*args))
        return found

    def test_a_wait_is_random_doubles_with_each_try_and_has_a_cap_of_an_hour(self):
        """Control: leave min() out, or the cap of the exponent."""
        for tries, longest in ((1, 2), (2, 4), (3, 8), (11, 2048), (12, 3600), (10 ** 18, 3600)):
            self.assertEqual(self.delays(tries, 1), [0, longest], tries)
        self.assertEqual(self.delays(3, 15), [0, 120])

    def test_a_time_that_the_server_asks_for_is_spread_and_capped(self):
        """Control: wait just what Retry-After says: all stations come back at once."""
        self.assertEqual(self.delays(1, 1, 7), [7, 14])
        self.assertEqual(self.delays(5, 1, 7), [7, 39])
        self.assertEqual(self.delays(0, 1, 0), [0, 1])
        self.assertEqual(self.delays(1, 1, 3600), [3600, 3600])

    def test_retry_after_is_seconds_or_a_date_and_at_most_an_hour(self):
        """Control: compare the date with this machine's clock, not with the server's."""
        date = "Thu, 01 Jan 2026 00:00:00 GMT"
        for text, expected in (
                ("7", 7),
                ("999999999", 3600),
                ("0", 0),
                ("", None),
                ("soon", None),
                ("-1", None),
                ("1.5", None),
                ("Thu, 01 Jan 2026 00:01:30 GMT", 90),
                ("Wed, 31 Dec 2025 00:00:00 GMT", 0),
                ("Fri, 02 Jan 2026 00:00:00 GMT", 3600),
                ("Thu, 01 Jan 99999 00:00:00 GMT", None)):
            answer = runs.Answer(503, {"retry-after": text, "date": date}, b"")
            self.assertEqual(runs.retry_after(answer), expected, text)

    def test_the_servers_wish_and_the_number_of_tries_decide_about_the_wait(self):
        """Control: count the tries from 0, or forget Retry-After."""
        for more in ({"Retry-After": "7"}, {}):
            self.box.fault("status", "GET /v2/runs", status=503, headers=more)
        with mock.patch.object(runs, "delay", return_value=0) as delay:
            self.client().list()
        self.assertEqual([call[0] for call in delay.call_args_list], [(1, 1, 7), (2, 1, None)])

    def test_a_wait_that_is_too_long_ends_the_command(self):
        self.box.fault("status", status=429, headers={"Retry-After": "3600"})
        self.run_script("ls", status=6)
        self.assertEqual(len(self.sent()), 1)

    def test_the_waits_of_a_command_add_up(self):
        """Control: counted for each request, the second waits too."""
        self.box.store.fill(3)
        with mock.patch.object(runs, "MAX_TOTAL_WAIT", 0.0015):     # inside() waits 0.001 s
            for skip in 0, 1:       # the first page's first request, and the second page's
                self.box.fault("status", ANY, status=429, skip=skip)
            self.fails(6, "ls", "--all", "--page-size", "1")
            self.box.calm()
            self.box.fault("status", ANY, status=429)
            self.ok("ls", "--all", "--page-size", "1")


# ---- tests: client -------------------------------------------------------------------------------

class Resending(Case):
    """A create whose answer is lost is sent again only where that makes no second run."""
    new_server_asks = [("POST", "/v2/runs"), ("GET", "/v2/whoami"), ("POST", "/v2/runs")]

    def old_server(self):
        """Makes the sandbox a server before September 2026."""
        self.box.store.knows_ref = False
        self.box.fault("status", "GET /v2/whoami", times=None, status=404)

    def asked(self):
        """(method, path) of what arrived."""
        return [request[:2] for request in self.sent()]

    def test_a_create_without_an_answer_makes_exactly_one_run(self):
        """Controls: without the look an old server has two runs; without the ref a new one has."""
        faults = ("drop-before", "drop-after", "reset", "cut", "status", "status after")
        for is_old in (False, True):
            for times in (1, 2):
                for fault in faults:
                    self.lose_the_answer(is_old, fault, times)

    def lose_the_answer(self, is_old, fault, times):
        """A create that meets a fault so many times makes one run."""
        self.box.calm()
        if is_old:
            self.old_server()
        kind, _, after = fault.partition(" ")
        self.box.fault(kind, "POST /v2/runs", times=times, after=bool(after))
        before = self.stored()
        ran = self.ok(*create(f"S-{len(before)}"), "-q")
        run_id = ran.out.strip()
        self.assertEqual(self.stored(), before + [run_id], (is_old, fault, times))

    def test_a_server_that_answers_whoami_is_simply_sent_the_run_again(self):
        """Control: look for the run there too, or send without the question."""
        self.box.fault("drop-after", "POST /v2/runs")
        self.ok(*CREATE, "-q")
        self.assertEqual(self.asked(), self.new_server_asks)

    def test_a_doubt_is_told_also_where_the_last_try_found_no_server(self):
        """Control: take any note of an error for one that tells the doubt."""
        lost = runs.Unavailable("no answer")
        away = runs.Unavailable("cannot reach it").with_note("proxy: none")
        away.maybe_sent = False
        client = self.client(retries=1)
        with mock.patch.object(client, "send", side_effect=[lost, away]), \
                mock.patch.object(client, "knows_ref", return_value=True), \
                mock.patch.object(runs, "delay", return_value=0.001):
            with self.assertRaises(runs.Unavailable) as caught:
                client.create(**BODY)
        self.assertIn("the run may be stored or not", caught.exception.text)

    def test_the_question_is_asked_once_by_a_client_and_its_clones(self):
        """Control: forget the answer."""
        client = self.client()
        for serial in ("A", "B"):
            self.box.fault("drop-after", "POST /v2/runs")
            client.create(**dict(BODY, serial_number=serial))
            client = client.clone()
            self.addCleanup(client.close)
        self.assertEqual(self.asked(), self.new_server_asks + [("POST", "/v2/runs")] * 2)
        self.assertEqual(len(self.stored()), 2)

    def test_a_create_that_is_answered_asks_nothing(self):
        self.ok(*CREATE, "-q")
        self.assertEqual(self.asked(), [("POST", "/v2/runs")])

    def test_an_old_server_is_searched_before_the_run_is_sent_again(self):
        self.old_server()
        self.box.fault("drop-after", "POST /v2/runs")
        self.ok(*CREATE, "-q")
        self.assertEqual(self.asked(), [
                ("POST", "/v2/runs"),
                ("GET", "/v2/whoami"),
                ("GET", "/v2/runs")])
        self.assertEqual(len(self.stored()), 1)

    def test_where_the_question_fails_nothing_is_sent_again(self):
        """Control: take any failure for an old server, or for a new one."""
        for status, body, expected in (
                (401, None, 3),
                (403, None, 6),
                (503, None, 6),
                (400, None, 6),
                (404, b"<html>", 6),
                (200, b"<html>", 6),
                (302, b"", 6)):
            self.box.calm()
            self.box.fault("drop-after", "POST /v2/runs", times=None)
            self.box.fault("status", "GET /v2/whoami", times=None, status=status, body=body)
            count = len(self.stored())
            ran = self.fails(expected, *create(f"S-{status}-{count}"), "--json")
            self.assertEqual(len(self.sent("POST")), 1, status)
            self.assertIn("may be stored or not", ran.error["message"])
            self.assertEqual(len(self.stored()), count + 1)

    def test_the_question_is_tried_again_like_a_read(self):
        """Control: ask once."""
        self.box.fault("drop-after", "POST /v2/runs")
        self.box.fault("status", "GET /v2/whoami", status=503)
        self.ok(*CREATE, "-q")
        self.assertEqual(len(self.stored()), 1)

    def test_where_the_look_fails_nothing_is_sent_again(self):
        self.old_server()
        self.box.fault("drop-after", "POST /v2/runs", times=None)
        self.box.fault("status", "GET /v2/runs", times=None)
        ran = self.fails(6, *CREATE, "--json")
        self.assertEqual(len(self.sent("POST")), 1)
        self.assertEqual(len(self.stored()), 1)
        self.assertIn("may be stored", ran.error["message"])

    def test_a_run_that_was_stored_long_before_the_first_try_is_not_taken_for_this_one(self):
        """Control: leave created_at out of the look."""
        self.old_server()
        self.made()
        self.box.store.db.execute("UPDATE runs SET created_at = created_at - 3600000")
        self.box.fault("drop-before", "POST /v2/runs")
        self.ok(*CREATE)
        self.assertEqual(len(self.stored()), 2)

    def test_create_attachment_is_not_repeated_once_it_may_have_arrived(self):
        run_id, client = self.made(), self.client()
        for kind in ("drop-after", "drop-before", "reset", "cut"):
            self.box.calm()
            self.box.fault(kind, "POST /v2/runs/{id}/attachments", times=None)
            ran = self.fails(6, "create-attachment", run_id, "--name", "a", "--json")
            self.assertEqual(len(self.sent("POST")), 1, ran)
            self.assertIn("empty attachment", ran.error["hint"])
            client.get(run_id)      # the same over a kept connection
            with self.assertRaises(runs.Unavailable):
                client.create_attachment(run_id, "a")
            self.assertEqual(len(self.sent("POST")), 1)


class PagesAhead(Case):
    """Up to four pages of a list are asked for at the same time, and come in their order."""

    def server(self, count, page=None):
        """All Clients read pages of `count` numbered rows; page(client, cursor) may give others.

        Returns the cursors in the order in which they were asked for.
        """
        cursors = []

        def call(client, operation, values):
            cursor = values.get("cursor", 0)
            cursors.append(cursor)
            other = page(client, cursor) if page else None
            end = min(cursor + values["limit"], count)
            rows = [{"id": str(number)} for number in range(cursor, end)]
            meta = {"has_more": end < count, "next_cursor": end if end < count else None}
            return other or {"data": rows, "meta": meta}
        patched = mock.patch.object(runs.Client, "call", call)
        patched.start()
        self.addCleanup(patched.stop)
        self.addCleanup(self.followed_threads())
        return cursors

    def followed_threads(self):
        """Returns a function that waits for all threads of pages.

        A thread that nobody waits for would ask in the next test.
        """
        waits = []
        start_thread = runs.start_thread

        def start(*args):
            waits.append(start_thread(*args))
            return waits[-1]

        def wait_for_all():
            for wait in waits:
                with contextlib.suppress(runs.Error):
                    wait()
        patched = patch("start_thread", start)
        patched.start()
        self.addCleanup(patched.stop)
        return wait_for_all

    def ids(self, **options):
        return [int(row["id"]) for row in self.client().iterate(page_size=10, **options)]

    def test_a_server_that_gives_more_rows_than_asked_for(self):
        """Control: count the limit below 0, and the next page is asked for with it."""
        def page(client, cursor):
            rows = [{"id": str(cursor + number)} for number in range(10)]
            return {"data": rows, "meta": {"has_more": True, "next_cursor": cursor + 10}}
        cursors = self.server(100, page)
        self.assertEqual(len(self.ids(limit=4)), 10)
        self.assertEqual(cursors, [0])
        self.assertEqual(self.ids(limit=0), [])

    def test_without_a_thread_the_pages_come_one_after_the_other(self):
        """Control: without the suppress in PageReader.read the list ends there."""
        cursors = self.server(35)

        def no_thread(*_):
            raise RuntimeError("can't start new thread")
        with patch("start_thread", no_thread):
            self.assertEqual(self.ids(), list(range(35)))
        self.assertEqual(cursors, [0, 10, 20, 30])

    def test_pages_that_arrive_in_another_order_are_given_in_theirs(self):
        """Control: ask for one page at a time: the first waits for the last in vain."""
        last_came = threading.Event()
        held = []

        def page(client, cursor):
            if cursor == 10:
                held.append(last_came.wait(10))
            if cursor == 40:
                last_came.set()
        self.server(50, page)
        self.assertEqual(self.ids(), list(range(50)))
        self.assertEqual(held, [True])

    def test_no_page_is_asked_for_that_the_limit_cannot_need(self):
        """Control: leave the limit out of ask_ahead."""
        for limit, pages in ((10, 1), (11, 2), (25, 3), (45, 5)):
            cursors = self.server(1000)
            self.assertEqual(self.ids(limit=limit), list(range(limit)))
            expected = [10 * number for number in range(pages)]
            self.assertEqual(sorted(cursors), expected, limit)

    def test_no_page_is_asked_for_behind_one_that_is_the_last(self):
        cursors = self.server(10)
        self.assertEqual(self.ids(), list(range(10)))
        self.assertEqual(cursors, [0])

    def test_no_more_than_four_pages_wait_for_their_reader(self):
        """Control: ask for all pages: memory grows with the number of runs."""
        cursors = self.server(1000)
        with contextlib.closing(self.client().pages(page_size=10)) as pages:
            for number, _ in zip(range(1, 40), pages):
                self.assertLessEqual(len(cursors), number + runs.PAGES_AHEAD)

    def test_a_page_that_was_asked_for_ahead_is_dropped_where_another_cursor_is_named(self):
        """Control: take it all the same: the rows from 15 to 19 are there twice, 20 is lost."""
        def page(client, cursor):
            if cursor == 10:    # a short page
                rows = [{"id": str(number)} for number in range(10, 15)]
                return {"data": rows, "meta": {"has_more": True, "next_cursor": 15}}
        cursors = self.server(50, page)
        self.assertEqual(self.ids(), list(range(50)))
        self.assertTrue({15, 25, 35} <= set(cursors))

    def test_pages_that_nobody_will_read_are_not_kept(self):
        """Controls: keep what was asked for ahead: memory grows where a server cuts its pages.
        Go on to guess: three requests of four are for nothing, and their threads grow in number.
        """
        def page(client, cursor):
            rows = [{"id": str(number)} for number in range(cursor, cursor + 7)]
            return {"data": rows, "meta": {"has_more": True, "next_cursor": cursor + 7}}
        cursors = self.server(1000, page)
        reader = runs.PageReader(self.client(), {}, 10)
        with contextlib.closing(reader):
            for cursor in range(0, 140, 7):
                reader.read(cursor, None)
                self.assertLess(len(reader.ahead), runs.PAGES_AHEAD)
        self.assertLessEqual(len(cursors), 20 + runs.PAGES_AHEAD)

    def test_429_and_503_make_it_one_at_a_time(self):
        """Control: go on with four."""
        threads = {}

        def page(client, cursor):
            threads[cursor] = threading.current_thread()
            if cursor == 10:
                client.transport.was_overloaded = True
        cursors = self.server(200, page)
        self.assertEqual(self.ids(), list(range(200)))
        late = {thread for cursor, thread in threads.items() if cursor >= 50}
        self.assertEqual(late, {threading.main_thread()})
        self.assertEqual(cursors[-15:], list(range(50, 200, 10)))

    def test_a_server_that_says_429_is_given_time_and_all_rows_come_once(self):
        self.box.store.fill(60)
        for status in (429, 503):
            self.box.fault("status", "GET /v2/runs", status=status, skip=3)
            ids = self.ok("ls", "--all", "--page-size", "10", "-q").out.split()
            self.assertEqual(len(ids), 60)
            self.assertEqual(len(set(ids)), 60)

    def test_a_page_that_fails_counts_when_its_turn_comes(self):
        """Control: raise as soon as a page ahead fails, or tell the cursor that was asked for."""
        failed = threading.Event()

        def page(client, cursor):
            if cursor == 30:
                failed.set()
                raise runs.Refused("no")
            if cursor == 10:
                failed.wait(10)
        self.server(50, page)
        found = []
        with self.assertRaises(runs.Refused) as caught:
            for row in self.client().iterate(page_size=10):
                found.append(int(row["id"]))
        self.assertEqual(found, list(range(30)))
        self.assertEqual(caught.exception.cursor, 30)

    def test_the_first_page_that_fails_tells_its_cursor(self):
        """Control: set the cursor behind the first page only."""
        self.box.fault("status", "GET /v2/runs", times=None)
        for cursor in (None, 40):
            with self.assertRaises(runs.Unavailable) as caught:
                next(self.client(retries=0).pages(cursor=cursor) if cursor
                     else self.client(retries=0).pages())
            self.assertEqual(caught.exception.cursor, cursor)

    def test_a_cursor_that_goes_back_ends_with_an_error_on_the_first_page_too(self):
        """Control: compare with 0 in place of the cursor."""
        for start, following in ((40, 40), (40, 30), (None, 0), (None, -1)):
            meta = {"has_more": True, "next_cursor": following}
            with self.assertRaisesRegex(runs.Unavailable, "does not advance"):
                runs.read_page({"data": [], "meta": meta}, start)

    def test_a_row_that_slips_to_a_later_page_is_given_once(self):
        """Control: compare with the page before alone."""
        def page(client, cursor):
            if cursor in (10, 20, 30):      # new runs arrived: each page begins with an old one
                rows = [{"id": str(number)} for number in range(cursor - 5, cursor + 5)]
                return {"data": rows, "meta": {"has_more": True, "next_cursor": cursor + 10}}
        self.server(60, page)
        found = self.ids()
        self.assertEqual(len(found), len(set(found)))

    def test_a_page_that_nobody_reads_any_more_is_not_tried_again(self):
        """Control: leave the retries in PageReader.close: a server that is away is told twice."""
        begun, ended = threading.Event(), threading.Event()
        wait_for_all = self.followed_threads()
        asked, told = [], []

        def send(client, name, wire, before_send=None):
            cursor = wire.get("cursor", 0)
            asked.append(cursor)
            if cursor == 20:
                begun.wait(10)
            if cursor == 30:
                begun.set()
                ended.wait(10)
                raise runs.Unavailable("away")
            meta = {"has_more": cursor < 20, "next_cursor": cursor + 10}
            return {"data": [{"id": str(cursor)}], "meta": meta}
        with mock.patch.object(runs.Client, "send", send), patch("delay", lambda *_: 0):
            client = self.client(notify=told.append)
            found = list(client.iterate(page_size=10))
            ended.set()
            wait_for_all()
        self.assertEqual([row["id"] for row in found], ["0", "10", "20"])
        self.assertEqual(asked.count(30), 1)
        self.assertEqual(told, [])

    def test_the_connections_of_the_pages_ahead_are_closed_at_the_end(self):
        """Control: leave close() out of the PageReader, or close one of them."""
        self.box.store.fill(80)
        client = self.client()
        closed = []
        clones = []
        real_close = runs.Transport.close
        real_clone = runs.Client.clone

        def close(transport):
            closed.append(transport)
            real_close(transport)

        def clone(client):
            clones.append(real_clone(client))
            return clones[-1]
        with mock.patch.object(runs.Transport, "close", close), \
                mock.patch.object(runs.Client, "clone", clone):
            self.assertEqual(len(list(client.iterate(limit=70, page_size=10))), 70)
        self.assertTrue(clones)
        for other in clones:
            self.assertIn(other.transport, closed)
        self.assertNotIn(client.transport, closed)      # that one is the caller's

    def test_a_dry_run_asks_for_one_page(self):
        ran = self.ok("ls", "--all", "--dry-run")
        self.assertEqual(len(ran.out.splitlines()), 1)
        self.assertEqual(ran.err, "")       # nothing was looked for


class Module(Case):
    """The Client as a module's caller sees it."""

    def test_the_client_has_the_operations_of_the_official_sdk(self):
        client = runs.Client()
        self.addCleanup(client.close)
        naive = datetime.datetime(2026, 5, 19, 10)
        aware = naive.astimezone(datetime.timezone(datetime.timedelta(hours=2)))
        end = aware + datetime.timedelta(seconds=5)
        phase = {"name": "p", "outcome": "PASS", "started_at": naive, "ended_at": aware}
        body = dict(BODY, started_at=naive, ended_at=end, phases=[phase])
        made = client.create(**body)
        self.assertEqual(list(made), ["id"])
        run_id = made["id"]
        run = client.get(run_id)
        self.assertIs(type(run), dict)
        self.assertEqual(run["duration"], "PT5S")
        self.assertEqual(runs.epoch(run["started_at"]), naive.timestamp())
        self.assertEqual(client.update_metadata(run_id, {"a": 1, "b": None}), made)
        self.assertEqual(client.update(id=run_id, attachments=[]), made)
        upload = client.create_attachment(id=run_id, name="a")
        self.assertEqual(set(upload), {"id", "upload_url"})
        page = client.list(outcomes=["PASS"], started_after=aware, include_metadata=True, limit=5)
        row, = page["data"]
        self.assertEqual(row["id"], run_id)
        self.assertEqual(row["metadata"], {"a": 1})
        self.assertEqual(client.delete(ids=[run_id]), {"id": [run_id]})
        self.assertEqual(self.box.connections, 1)

    def test_iterate_gives_all_runs_or_the_limit(self):
        self.box.store.fill(130)
        client = self.client()
        self.assertEqual(len({run["id"] for run in client.iterate()}), 130)
        some = list(client.iterate(limit=7, page_size=3, started_after="24h"))
        self.assertEqual(len(some), 7)

    def test_attach_uploads_files_and_links_those_that_are_missing(self):
        run_id = self.made()
        for count in (1, 0):
            found = self.client().attach(run_id, [self.file("a.txt")])
            self.assertEqual([row["name"] for row in found], ["a.txt"])
            self.assertEqual(len(self.sent("PUT")), count)
        self.assertEqual(self.attached(run_id), ["a.txt"])

    def test_errors_are_split_by_what_a_caller_does_next(self):
        client = self.client(retries=0)
        stranger = runs.Client(self.box.url, "wrong-key")
        self.addCleanup(stranger.close)
        self.box.fault("status", "PATCH .*")
        for kind, call in (
                (runs.BadInput, lambda: client.list(limt=5)),
                (runs.BadInput, lambda: client.list(metadata=True)),
                (runs.BadInput, lambda: client.get("")),
                (runs.BadInput, lambda: client.get("..")),
                (runs.BadInput, lambda: client.get(5)),
                (runs.BadInput, lambda: client.update("a", attachment=["b"])),
                (runs.BadInput, lambda: client.update_metadata("a", {"k": math.nan})),
                (runs.BadInput, lambda: client.update_metadata("a", 3)),
                (runs.BadInput, lambda: client.attach(NOBODY, ["a\0b"])),
                (runs.NotFound, lambda: client.get(NOBODY)),
                (runs.NotFound, lambda: client.get("no UUID")),
                (runs.NotFound, lambda: client.delete([NOBODY])),
                (runs.Unavailable, lambda: client.update(NOBODY)),
                (runs.AccessDenied, lambda: stranger.list())):
            with self.assertRaises(kind) as caught:
                call()
            self.assertIsInstance(caught.exception, runs.Error)

    def test_a_bad_create_tells_all_its_problems_as_issues(self):
        with self.assertRaises(runs.BadInput) as caught:
            self.client().create(outcome="PASS", started_at="now", phases=[{"name": 1}])
        paths = [issue.split(": ")[0] for issue in caught.exception.issues]
        self.assertEqual(paths[0], "started_at")
        self.assertIn("phases[0].name", paths)
        self.assertIn("serial_number", paths)

    def test_a_keyword_that_is_nearly_a_field_is_refused_with_the_name_that_was_meant(self):
        """Control: send it on: the server drops it in silence."""
        with self.assertRaisesRegex(runs.BadInput, "part_numer: .*did you mean part_number"):
            self.client().create(**dict(BODY, part_numer="P"))
        self.assertEqual(self.sent(), [])
        stored = runs.store(dict(BODY, part_numer="P"))
        self.assertEqual(stored["state"], "parked")
        self.assertEqual(len(stored["problems"]), 1)

    def test_errors_say_all_they_know(self):
        with self.assertRaisesRegex(runs.Unavailable, "cannot reach"):
            runs.Client(CLOSED, self.box.user_key, retries=0).list()
        with self.assertRaisesRegex(runs.BadInput, "serial_number: missing"):
            self.client().create(outcome="PASS")

    def test_each_wait_is_told_to_notify_and_each_request_to_trace(self):
        waits, requests = [], []
        self.box.fault("status", times=2)
        with mock.patch.object(runs, "delay", lambda *_: 0.001):
            self.client(notify=waits.append, trace=requests.append).list()
        self.assertEqual(len(waits), 2)
        self.assertEqual(len(requests), 3)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork there")
    def test_a_client_opens_connections_of_its_own_after_a_fork(self):
        """Control: leave the PID out: both processes talk over one connection."""
        client = self.client(retries=0)
        client.list()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # 3.12 warns of threads: the sandbox's
            child = os.fork()
        if child == 0:
            status = 1
            try:
                client.list()
                status = 0
            finally:
                os._exit(status)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(self.box.connections, 2)
        client.list()
        self.assertEqual(self.box.connections, 2)

    def test_importing_the_module_leaves_signals_and_the_path_alone(self):
        """Control: catch the signals, or shorten sys.path, when the file is read."""
        code = ("import signal, sys; numbers = signal.SIGINT, signal.SIGTERM; "
                f"sys.path.insert(0, {HERE!r}); path = sys.path[:]; "
                "before = [signal.getsignal(n) for n in numbers]; import tofupilot_runs; "
                "assert before == [signal.getsignal(n) for n in numbers]; "
                "assert path == sys.path")
        self.ended(self.popen(sys.executable, "-c", code), 0)

    def test_main_in_a_thread_needs_no_signals(self):
        """Control: let catch_signals raise outside of the main thread."""
        code = (f"import sys, threading; sys.path.insert(0, {HERE!r}); import tofupilot_runs; "
                "found = []; thread = threading.Thread(target=lambda: found.append("
                "tofupilot_runs.main(['ls', '-q']))); thread.start(); thread.join(); "
                "sys.exit(found[0])")
        self.ended(self.popen(sys.executable, "-c", code), 0)


# ---- tests: files --------------------------------------------------------------------------------

    def test_one_path_alone_is_a_list_of_one(self):
        """Control: take the letters of the path for paths."""
        path = self.file("log.txt", b"x")
        stored = runs.store(BODY, path, queue=self.at("q"))
        self.assertEqual(stored["problems"], [])
        run_id = self.made()
        self.assertEqual(len(self.client().attach(run_id, path)), 1)

    def test_keys_that_are_no_text_are_written_as_json_writes_them(self):
        """Control: leave them to json.dumps, which sorts no keys of two kinds: TypeError."""
        value = {2: "a", None: 2, True: 3, "b": (4, 5)}
        body = body_with({"measured_value": value})
        self.assertEqual(runs.store(body, queue=self.at("q"))["problems"], [])
        run = self.client().get(self.client().create(**body)["id"])
        found = run["phases"][1]["measurements"][0]["measured_value"]
        self.assertEqual(found, {"2": "a", "true": 3, "null": 2, "b": [4, 5]})

    def test_a_key_of_metadata_that_is_no_text_is_told(self):
        """Control: JSON would sort it beside the others: TypeError."""
        with self.assertRaisesRegex(runs.BadInput, "metadata.1: a key must be text"):
            self.client().create(**dict(BODY, metadata={1: "a", "b": 2}))


class Attaching(Case):
    """Files go up once, whole, without the key, and are linked last."""

    def bytes_of(self, run_id):
        """{name: bytes} of a run's attachments, as they lie on the storage."""
        found = {}
        for row in self.client().get(run_id)["attachments"]:
            found[row["name"]] = content(self.box.store.object_path(row["id"]))
        return found

    def when_created(self, change):
        """Calls change() once, when the create of the run arrives."""
        def act(record):
            if record.method == "POST" and record.path == "/api/v2/runs":
                self.box.on_request = None
                change()
        self.box.on_request = act

    def test_files_go_up_without_the_key_and_only_those_that_are_missing(self):
        self.file("a.pdf", b"%PDF" * 50000)
        self.file("empty.xyzzy", b"")
        line = [*CREATE, "--attach", "a.pdf", "empty.xyzzy"]
        ran = self.ok(*line, "--json")
        names = [row["name"] for row in ran.json["attachments"]]
        self.assertEqual(names, ["a.pdf", "empty.xyzzy"])
        puts = [request.headers for request in self.box.requests if request.method == "PUT"]
        self.assertEqual(len(puts), 2)
        for headers, kind, size in zip(puts, ("application/pdf", "application/octet-stream"),
                                       ("200000", "0")):
            self.assertEqual(headers["content-type"], kind)
            self.assertEqual(headers["content-length"], size)
            self.assertNotIn("authorization", headers)
            self.assertNotIn("transfer-encoding", headers)
        rows = self.client().get(ran.json["id"])["attachments"]
        self.assertEqual([row["size"] for row in rows], [200000, 0])
        for data, count in ((b"b", 1), (b"b", 0), (b"B", 1)):   # at last only its bytes differ
            self.file("b.txt", data)
            self.sent()
            self.ok(*line, "b.txt")
            for request in self.box.requests:
                is_storage = request.path.startswith("/storage/")
                self.assertNotEqual(is_storage, "authorization" in request.headers)
            self.assertEqual(len(self.sent("PUT")), count)
        self.assertEqual(len(self.stored()), 1)

    def test_a_file_that_grows_goes_up_with_the_bytes_of_the_start(self):
        """Control: read to the end of the file: its size does not fit what was announced."""
        path = self.file("x.log", b"12345" * 40000)

        def grow():
            with open(path, "ab") as file:
                file.write(b"more" * 50000)
        self.when_created(grow)
        run_id = self.ok(*CREATE, "--attach", path, "-q").out.strip()
        self.assertEqual(self.bytes_of(run_id), {"x.log": b"12345" * 40000})

    def test_a_file_that_vanishes_or_shrinks_later_is_6_with_the_id_of_the_run(self):
        """Control: take it for bad input (2), or upload what is left."""
        def truncate(path):
            with open(path, "wb") as file:
                file.write(b"12")
        for number, change in enumerate((os.remove, truncate)):
            path = self.file("x.log", b"12345")
            self.when_created(lambda: change(path))
            ran = self.fails(6, *create(f"S-{number}"), "--attach", path, "--json")
            self.assertEqual(ran.error["id"], self.stored()[number])
            self.assertIn("x.log", ran.error["message"])
            self.assertEqual(self.attached(ran.error["id"]), [])

    def special_files(self):
        """Paths that no file can be read from, as far as this system has such."""
        os.mkdir(self.at("folder"))
        paths = [self.at("folder"), self.at("none.txt"), self.at("folder", "none.txt")]
        if hasattr(os, "mkfifo"):
            os.mkfifo(self.at("fifo"))
            paths.append(self.at("fifo"))
        system = [os.devnull, "/proc/cpuinfo", "/dev/zero"]
        return paths + [path for path in system if os.path.exists(path) or path == os.devnull]

    def test_what_is_no_regular_file_is_bad_input_and_nothing_is_sent(self):
        """Control: open it as any file: /proc/cpuinfo is attached with 0 bytes."""
        run_id = self.made()
        for path in self.special_files():
            for line in ([*CREATE, "--attach", path],
                         ["create-attachment", run_id, "--file", path]):
                ran = self.fails(2, *line, "--json")
                self.assertIn(os.path.basename(path), ran.error["message"])
                self.assertEqual(self.sent(), [], path)

    def test_a_folder_is_told_as_a_folder(self):
        """Windows says "Permission denied" for one."""
        os.mkdir("folder")
        self.assertIn("is a folder", self.fails(2, *CREATE, "--attach", "folder").err)

    def test_a_file_that_the_storage_finds_too_large_is_5_with_the_id_of_the_run(self):
        """Control: take it for a storage that is away (6), and upload the whole file again."""
        path = self.file("x.log")
        too_large = b"<Error><Code>EntityTooLarge</Code></Error>"
        for status, body, expected in (
                (413, b"<html>", 5),
                (400, too_large, 5),
                (400, b"<Error/>", 6)):
            self.box.calm()
            self.box.fault("status", "PUT /storage/{id}", times=None, status=status, body=body)
            line = create(f"S-{status}-{len(body)}", "--attach", path, "--json")
            error = self.fails(expected, *line).error
            self.assertEqual(error["id"], self.stored()[-1])
            is_told_as_too_large = "too large" in error["message"]
            self.assertEqual(is_told_as_too_large, expected == 5)
            if expected == 5:
                self.assertEqual(len(self.sent("PUT")), 1)

    def test_an_upload_url_that_expired_is_asked_for_again_once(self):
        self.file("a.txt")
        self.file("b.txt")
        self.box.fault("status", "PUT /storage/{id}", status=403, body=b"<Error/>")
        ran = self.ok(*CREATE, "--attach", "a.txt", "-q")
        run_id = ran.out.strip()
        self.assertEqual(len(self.sent("PUT")), 2)
        self.assertEqual(self.attached(run_id), ["a.txt"])
        self.box.store.upload_ttl = -10
        ran = self.fails(6, *CREATE, "--attach", "a.txt", "b.txt", "--json")
        self.assertEqual(len(self.sent("PUT")), 2)
        self.assertEqual(ran.error["id"], run_id)
        self.assertIn("b.txt", ran.error["message"])
        self.assertNotIn("signature", ran.err)

    def test_what_others_linked_stays_linked_even_where_patch_replaces(self):
        """Control: leave the second PATCH out of link()."""
        self.box.store.patch = "replace"
        run_id = self.ok(*CREATE, "-q").out.strip()
        self.put(run_id, "theirs", b"x")
        self.ok(*CREATE, "--attach", self.file("a.txt"))
        self.assertEqual(sorted(self.attached(run_id)), ["a.txt", "theirs"])

    def test_files_that_went_up_are_linked_also_where_another_failed(self):
        """Control: without the link of what is done, the first goes up twice."""
        paths = [self.file("a.txt"), self.file("b.txt")]
        line = [*CREATE, "--attach", *paths]
        self.box.fault("status", "PUT .*", skip=1)
        ran = self.fails(6, *line, *ONCE)
        self.assertIn("1 of 2 attachments not: b.txt", ran.err)
        run_id, = self.stored()
        self.assertEqual(self.attached(run_id), ["a.txt"])
        ran = self.ok(*line)
        self.assertIn("Already there: a.txt", ran.out)
        self.assertEqual(len(self.sent("PUT")), 3)

    def test_uploads_that_the_server_forgot_before_they_were_linked_go_up_again(self):
        """Control: leave the second upload out of attach()."""
        run_id = self.made()
        self.box.fault("status", "PATCH /v2/runs/{id}", status=404, body={"message": "no upload"})
        self.ok("create-attachment", run_id, "--file", self.file("a.txt"))
        self.assertEqual(len(self.sent("PUT")), 2)
        self.assertEqual(self.attached(run_id), ["a.txt"])

    def test_create_attachment_with_a_file_does_the_whole_job(self):
        run_id = self.made()
        self.file("a.txt", b"a")
        for words, names in (([], ["a.txt"]), (["--name", "b.log"], ["a.txt", "b.log"])):
            self.ok("create-attachment", "--id", run_id, "--file", "a.txt", *words)
            self.assertEqual(self.attached(run_id), names)
        self.assertIn("Already there: a.txt",
                      self.ok("create-attachment", run_id, "--file", "a.txt").out)

    def test_create_attachment_without_a_file_says_how_to_go_on(self):
        run_id = self.made()
        ran = self.ok("create-attachment", run_id, "--name", "c", "--json")
        self.assertEqual(set(ran.json), {"id", "upload_url"})
        text = self.ok("create-attachment", run_id, "--name", "c.csv").out
        for word in ("curl -X PUT", "Content-Type: text/csv", "attachments finalize --id",
                     f"create-attachment --id {run_id} --file FILE"):
            self.assertIn(word, text)

    def test_a_file_for_a_run_that_is_not_there_is_not_told_as_half_done(self):
        path = self.file("a.txt")
        line = ["create-attachment", "--id", NOBODY, "--file", path, *ONCE, "--json"]
        for more, status, told in (((), 4, "no run"), (("--url", CLOSED), 6, "cannot reach")):
            ran = self.fails(status, *line, *more)
            self.assertNotIn("is stored", ran.err)
            self.assertIn(told, ran.error["message"])
        self.assertIn("--file", self.fails(2, "create-attachment", "--id", NOBODY).err)

    def test_uploads_by_hand_are_made_linked_and_closed(self):
        run_id = self.made()
        made = self.ok("attachments", "initialize", "--name", "a.txt", "--json").json
        urlopen(WebRequest(made["upload_url"], b"x", method="PUT")).close()
        self.ok("attachments", "finalize", "--id", made["id"])
        self.assertIn("1 attachment linked",
                      self.ok("update", run_id, "--attachments", made["id"]).out)
        self.assertEqual(self.attached(run_id), ["a.txt"])

    def test_out_onto_the_null_device_makes_no_file(self):
        """Control: rename a part onto it, which root can."""
        before = os.listdir(self.folder)
        self.run_script("ls", "--out", os.devnull, status=0)
        self.assertEqual(os.listdir(self.folder), before)
        self.assertFalse(os.path.isfile(os.devnull))

    @unittest.skipUnless(POSIX, "links, modes and FIFOs are of POSIX")
    def test_out_keeps_links_modes_and_devices(self):
        """Control: rename onto the link, or onto the FIFO."""
        os.mkfifo("fifo")
        with open(os.open("fifo", os.O_RDWR | os.O_NONBLOCK), "rb", 0) as fifo:
            self.run_script("ls", "--out", "fifo", status=0)
            self.assertIn(b"OUTCOME", fifo.read(100))
        os.symlink(self.file("target"), "link")
        os.chmod("target", 0o600)
        self.ok("ls", "--out", "link")
        self.assertTrue(os.path.islink("link"))
        self.assertEqual(stat.S_IMODE(os.stat("target").st_mode), 0o600)
        self.assertIn(b"OUTCOME", content("target"))
        self.assertIn("OUTCOME", self.ok("ls", "--out", "-").out)
        with open("log", "ab") as log:      # not replaced behind the shell's back
            log.write(b"before\n")
            log.flush()
            self.run_script("ls", "--out", "/dev/stdout", stdout=log, status=0)
        self.assertRegex(content("log"), b"^before\nID\t")

    def test_a_link_that_was_planted_beside_out_is_not_followed(self):
        """Control: open the part with a name that can be guessed, or without O_EXCL."""
        names = []
        real = os.open

        def watch(path, flags, *more, **options):
            if str(path).endswith(".part"):
                names.append(os.path.basename(path))
                self.assertTrue(flags & os.O_EXCL)
            return real(path, flags, *more, **options)
        with mock.patch.object(os, "open", watch):
            self.ok("ls", "--out", "r.csv")
            self.ok("ls", "--out", "r.csv")
        self.assertEqual(len(set(names)), 2)
        self.assertNotIn(str(os.getpid()), names[0])
        self.assertEqual(os.listdir(self.folder), ["r.csv"])


# ---- tests: commands that read -------------------------------------------------------------------

class Listing(Case):
    """ls: pages, forms of output, notes, summary."""

    def test_limit_is_the_rows_wanted(self):
        self.box.store.fill(260)
        for words, pages, count in (
                ("", "0:50", 50),
                ("--cursor 255 --all", "255:100", 5),
                ("--limit 250", "0:100 100:100 200:50", 250),
                ("--limit 70 --page-size 30", "0:30 30:30 60:10", 70)):
            ids = self.ok("ls", "-q", *words.split()).out.split()
            asked = []
            for request in self.sent():
                query = dict(request[2])
                asked.append(f"{query.get('cursor', 0)}:{query['limit']}")
            self.assertEqual(sorted(asked), sorted(pages.split()))
            self.assertEqual(len(ids), count, words)
            self.assertEqual(len(set(ids)), count, words)
        ids = self.ok("ls", "-q", "--all").out.split()
        self.assertEqual(len(ids), 260)

    def test_the_first_page_is_written_before_the_second_is_asked_for(self):
        """Control: without the flush of each page the second request waits its 10 s in vain."""
        self.box.store.fill(150)
        for words, lines in ((["-q"], 100), ([], 101), (["--json"], 100), (["--format=csv"], 101)):
            printed, held = threading.Event(), []

            def hold(record, printed=printed, held=held):
                if "cursor=100" in record.query:
                    held.append(printed.wait(10))
            self.box.on_request = hold
            with self.start("ls", "--all", *words) as process:
                for _ in range(lines):
                    process.stdout.readline()
                printed.set()
                process.communicate()
            self.assertEqual(held, [True], words)
            self.assertEqual(process.returncode, 0, words)

    def test_a_page_that_fails_leaves_a_whole_document_or_the_old_file(self):
        self.box.store.fill(150)
        self.says("GET /v2/runs", None, 503, skip=1)
        ran = self.fails(6, "ls", "--all", *ONCE, "--json")
        self.assertEqual(len(ran.json["data"]), 100)
        self.assertEqual(ran.json["meta"], {"has_more": True, "next_cursor": 100})
        self.assertIn("--cursor 100", ran.error["hint"])
        self.file("old.csv", b"old")
        line = ["ls", "--all", *ONCE, "--format", "csv", "--out", "old.csv"]
        self.says("GET /v2/runs", None, 503, skip=1)
        self.fails(6, *line)
        self.assertEqual(content("."), {"old.csv": b"old"})
        self.box.calm()
        self.ok(*line)
        self.assertEqual(os.listdir("."), ["old.csv"])
        self.assertEqual(content("old.csv").count(b"\n"), 151)

    def test_a_run_that_slips_to_the_next_page_is_printed_once(self):
        """Control: leave the known IDs out of pages()."""
        self.box.store.fill(150)
        first = self.stored()
        seeds = iter((1, 2))

        def arrive(record):
            if "cursor=100" in record.query:
                self.box.store.fill(3, next(seeds))
        self.box.on_request = arrive
        ids = self.ok("ls", "-q", "--all").out.split()
        self.assertEqual(sorted(ids), sorted(first))
        ids = self.ok("ls", "-q", "--limit", "120").out.split()
        self.assertEqual(len(ids), 120)
        self.assertEqual(len(set(ids)), 120)

    def test_an_odd_page_ends_with_6(self):
        for text in (
                '{"data": [{"id": "a"}], "meta": {"has_more": true, "next_cursor": 0}}',
                '{"data": [{"id": "a"}], "meta": {"has_more": true, "next_cursor": null}}',
                '{"data": [{"id": "a"}], "meta": {"has_more": true}}',
                '{"data": [{"id": "a"}], "meta": []}',
                '{"data": [{"id": "a"}]}',
                '{"meta": {}}',
                '{"data": {}, "meta": {}}',
                '{"data": [1], "meta": {}}'):
            self.says(ANY, text.encode())
            self.fails(6, "ls", "--all", *ONCE)
            self.assertEqual(len(self.sent()), 1)

    def test_a_span_of_time_in_which_nothing_can_lie_is_a_warning(self):
        """Control: say that no run matches, as if none had failed that day."""
        day = "2026-05-19"
        for name in ("started", "ended", "created"):
            for before, is_told in ((day, True), ("2026-05-18", True), ("2026-05-20", False)):
                ran = self.ok("ls", f"--{name}-after", day, f"--{name}-before", before)
                self.assertEqual(f"--{name}-before is not later" in ran.err, is_told)

    def test_metadata_that_was_asked_for_is_shown_in_each_form(self):
        """Control: show the usual columns alone."""
        self.made(metadata={"lot": "L\xfc7"})
        for format in ("table", "csv", "jsonl"):
            ran = self.ok("ls", "--include-metadata", "--format", format)
            self.assertRegex(ran.out, r"(?i)metadata")
            self.assertRegex(ran.out, r"lot\W+: \W+L(\xfc|\\u00fc)7")
        self.assertNotIn("metadata", self.ok("ls", "--format", "csv").out)
        status, text = self.terminal("ls", "--include-metadata")
        self.assertIn('{"lot": "', text)

    def test_rows_come_as_table_lines_of_json_csv_and_ids(self):
        run_id = self.made(docstring="=1+1\t\x1b[2J\n,", metadata={"a": 1})
        names = "id,docstring,metadata.a,unit.batch.x"
        columns = ["ls", "--include-metadata", "--columns", names]
        header, row = self.ok("ls").out.splitlines()
        self.assertEqual(header, "ID\tOUTCOME\tSERIAL\tPROCEDURE\tSTARTED")
        self.assertEqual(row, f"{run_id}\tPASS\tSN-0001\tBurn-in\t2026-05-19T08:00:00Z")
        row = self.ok(*columns).out.splitlines()[1]
        self.assertEqual(row, f"{run_id}\t=1+1\\t\\x1b[2J\\n,\t1\t")
        row = json.loads(self.ok("ls", "--format", "jsonl").out)
        self.assertEqual(self.ok("ls", "--json").json["data"], [row])
        row = json.loads(self.ok(*columns, "--format", "jsonl").out)
        self.assertEqual(list(row), names.split(","))
        self.assertEqual(row["id"], run_id)
        self.assertEqual(row["metadata.a"], 1)
        self.assertIsNone(row["unit.batch.x"])
        text = self.ok(*columns, "--format", "csv").out
        header, row = csv.reader(io.StringIO(text, newline=""))
        self.assertEqual(header, names.split(","))
        self.assertEqual(row, [run_id, "'=1+1\t\\x1b[2J\n,", "1", ""])
        text = self.ok("ls", "--format=csv", "--columns", "id,x\x1b").out
        self.assertEqual(text.splitlines()[0], '"id","x\\x1b"')
        self.assertEqual(self.ok("ls", "-q").out, run_id + "\n")
        ran = self.fails(2, "ls", "--format", "xml")
        self.assertEqual(ran.out, "")

    def test_a_document_of_json_ends_with_a_newline(self):
        run_id = self.made()
        for words in ("ls", f"get {run_id}", f"get {run_id} {run_id}", "ls --summary", "check",
                      "create --example", f"update {run_id}"):
            out = self.ok(*words.split(), "--json").out
            self.assertEqual(out[-2:], "}\n", words)
            json.loads(out)

    def test_a_column_of_metadata_asks_for_it(self):
        self.made(metadata={"shift": "A"})
        self.assertIn("A", self.ok("ls", "--columns", "id,metadata.shift").out.splitlines()[1])

    def test_a_column_that_no_run_has_is_told_and_no_failure(self):
        """Control: leave the warnings of the Screen out."""
        self.made()
        ran = self.ok("ls", "--columns", "id,unit.serial_numbr")
        self.assertIn("did you mean unit.serial_number?", ran.err)
        self.assertEqual(self.ok("ls", "--columns", "id,unit.serial_numbr", "--json").err, "")

    def test_columns_that_were_asked_for_are_all_shown(self):
        self.made()
        columns = "id,outcome,unit.serial_number,procedure.name,started_at,duration"
        text = self.terminal("ls", "--columns", columns, COLUMNS="40")[1]
        self.assertEqual([len(line.split()) for line in text.splitlines()], [6, 8])

    def test_more_to_come_is_noted_on_stderr_with_the_cursor(self):
        self.box.store.fill(60)
        self.assertIn("--cursor 50", self.ok("ls").err)
        self.assertIn("--cursor 12", self.ok("ls", "--limit", "5", "--cursor", "7").err)

    def test_nothing_is_noted_where_all_was_shown_or_ids_or_json_are_wanted(self):
        """Control: tell with -q that more exist."""
        self.box.store.fill(60)
        for words in ("--limit 60", "--all", "--json", "--json --cursor 90", "--format json",
                      "-q", "-q --limit 5", "-q --serial-numbers none"):
            self.assertEqual(self.ok("ls", *words.split()).err, "", words)

    def test_no_match_can_be_a_failure(self):
        self.assertEqual(self.ok("ls", "--json").json, {
            "data": [], "meta": {"has_more": False, "next_cursor": None}})
        for words in ("-q", "--json", "--format csv", "--summary"):
            self.assertEqual(self.fails(4, "ls", "--fail-empty", *words.split()).out, "")
        self.made()
        self.ok("ls", "--fail-empty")

    def test_a_summary_counts_outcomes_and_yields(self):
        """Control: count a unit as passed that passed once: C's last run failed."""
        for number, (serial, outcome) in enumerate((
                ("A", "FAIL"),
                ("A", "PASS"),
                ("B", "PASS"),
                ("C", "PASS"),
                ("C", "ERROR"),
                ("D", "FAIL"))):
            self.made(serial_number=serial, outcome=outcome, started_at=f"{BEGIN[:18]}{number}Z")
        found = self.ok("ls", "--summary", "--json").json
        row, = found["procedures"]
        self.assertEqual(found["outcomes"], {"PASS": 3, "FAIL": 2, "ERROR": 1})
        self.assertEqual(row["units"], 4)
        self.assertEqual(row["yield"], 0.5)
        self.assertEqual(row["first_pass_yield"], 0.5)
        self.assertIn({"serial_number": "A", "count": 1}, found["failing_serials"])
        text = self.ok("ls", "--summary").out
        for word in ("50.0%", "last run here passed", "first run here passed", "6 runs"):
            self.assertIn(word, text)

    def test_relative_times_are_sent_with_their_offset(self):
        """Control: send today as the server's midnight."""
        for word, days in (("today", 0), ("yesterday", 1)):
            before = datetime.datetime.now().astimezone()
            self.ok("ls", "--started-after", word)
            sent = dict(self.sent()[0][2])["started_after"]
            midnight = (before - datetime.timedelta(days=days)).strftime("%Y-%m-%dT00:00:00")
            self.assertTrue(sent.startswith(midnight), (sent, midnight))
            self.assertRegex(sent, r"[+-]\d\d:\d\d$")

    def test_a_time_zone_that_this_machine_does_not_know_is_warned_of(self):
        """Control: leave warn_of_zone out of a command."""
        create_line = create("S", "--queue", "q", "--offline")
        with mock.patch.object(runs, "unknown_time_zone", lambda: "Europe/Nowhere"):
            for line in (["ls"], CREATE, create_line):
                self.assertIn("warning: TZ=Europe/Nowhere", self.ok(*line).err)
            self.assertRegex(self.fails(2, "check").out, "FAIL  zone .*Europe/Nowhere")


ODD_VALUES = (None, 7, -0.5, 1e308, 10 ** 30, True, "", "x\x1b[2J\n", [], {}, [1], [[]], [None],
              [[{}]], {"a": [1]}, {"id": [None]}, "0001-01-01T00:00:00+14:00",
              "9999-12-31T23:59:59-12:00", "PT" + "9" * 400 + "S")


def reported():
    """The body of a run that has something of everything to report."""
    body = dict(example_run("0001", 1779177600000), docstring="Again", part_number="PCB",
                batch_number="B7", procedure_version="1.2", ended_at=END, execution_id="e",
                slot_key="s", metadata={"shift": "A"})
    body["phases"][0]["retry_count"] = 1
    body["phases"][0]["measurements"].append(
        {"name": "firmware", "outcome": "PASS", "measured_value": "1.1"})
    axes = {"x_axis": {"data": [0, 1, 2]}, "y_axis": [
        {"data": [5, 7, 6], "name": "A", "units": "mA", "aggregations": [{"type": "max"}]}]}
    body["phases"].append(
        {"name": "Sweep", "outcome": "PASS", "started_at": BEGIN, "ended_at": END,
         "measurements": [dict({"name": "i", "outcome": "PASS"}, **axes)]})
    return body


REPORTED = reported()


def report_of(serial):
    """The same for another unit."""
    return dict(REPORTED, serial_number=serial, execution_id=serial)


def places(value, path=()):
    """The path of everything inside a JSON value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield path + (key,)
            yield from places(value[key], path + (key,))


def with_odd(value, path, odd):
    """A copy of a JSON value with an odd one at a path."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = odd
    return copy


def oddities(value, each=4):
    """Copies of a JSON value, each with an odd value somewhere; at each place `each` of them."""
    odd = itertools.cycle(ODD_VALUES)
    for path in places(value):
        for _ in range(each):
            yield with_odd(value, path, next(odd))


class Getting(Case):
    """get: the report, several runs, measurements as rows, downloads."""

    def test_the_report_tells_verdict_limits_and_distance(self):
        run_id = self.made(**REPORTED)
        text = self.ok("get", run_id).out
        self.assertRegex(text, r"^FAIL +SN-0001 +Burn-in 1\.2 +.*42s\n")
        for word in (run_id, "Night shift", "Again", "shift=A", "Sweep", "3 points",
                     "(attempt 2)", "1 WARNING", "--logs", "Ada"):
            self.assertIn(word, text)
        self.assertRegex(text, r"FAIL +vcc +3\.52 V +3\.1 to 3\.4 V +<-- 0\.12 above\n")
        text = self.ok("get", run_id, "--failed-only", "--logs").out
        self.assertNotIn("Sweep", text)
        self.assertNotIn("firmware", text)
        self.assertIn("vcc above its limit", text)

    def test_exit_status_is_10_unless_every_run_passed(self):
        passed, failed = self.made(), self.made(serial_number="B", outcome="FAIL")
        self.ok("get", passed, passed, "--exit-status")
        self.fails(10, "get", failed, "--exit-status")
        self.fails(10, "get", passed, failed, "--exit-status", "--json")
        self.ok("get", failed)

    def test_json_is_the_untouched_answer(self):
        answer = {"z": [1, 2.50, None], "id": "x", "a": WORLD + "\x1b", "newer": {"k": {}}}
        self.box.fault("status", status=200, body=answer)
        out = self.ok("get", "--id", NOBODY, "--json").out
        found = json.loads(out)
        self.assertEqual(list(found.items()), list(answer.items()))
        self.assertLess(max(out), "\x80")

    def test_ids_come_as_flags_as_words_from_a_file_and_from_stdin(self):
        one = self.made()
        two = self.made(serial_number="B")
        text = f"{one}\r\n{two}\r\n"
        self.file("ids.txt", text.encode("utf-16"))
        for words in (
                f"--id {one} {two}",
                f"--ids {one} --id {two}",
                f"{one} {two}",
                "--ids @ids.txt",
                "@ids.txt",
                "--ids -",
                "-"):
            ran = self.ok("get", *words.split(), "--json", input=text.encode())
            ids = [run["id"] for run in ran.json["data"]]
            self.assertEqual(ids, [one, two], words)
        self.assertEqual(self.ok("get", one, two, "-q").out.split(), [one, two])
        report = self.ok("get", one, two).out
        self.assertEqual(report.count("Burn-in"), 2)
        ran = self.fails(2, "get", one, "--ids", two)
        self.assertIn("cannot be combined", ran.err)
        for data in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
            self.fails(2, "get", "-", input=data)

    def test_the_run_of_a_serial_number_is_its_newest(self):
        """Control: take the oldest, or the one that was stored last."""
        day = "2026-05-19T"
        self.made(serial_number="U", started_at=day + "07:00:00Z")
        newest = self.made(serial_number="u", started_at=day + "07:30:00Z")
        self.made(serial_number="U", started_at=day + "06:00:00Z")
        run = self.ok("get", "--serial-number", "U", "--json").json
        self.assertEqual(run["id"], newest)
        list_request, _ = self.sent()
        query = list_request[2]
        self.assertEqual(sorted(query), [("limit", "1"), ("serial_numbers", "U")])
        ran = self.fails(4, "get", "--serial-number", "X")
        self.assertIn("no run of the unit X", ran.err)
        self.fails(2, "get", newest, "--serial-number", "U")
        ran = self.fails(2, "get")
        self.assertIn("--serial-number", ran.err)

    def test_a_run_that_is_missing_among_several_is_told_and_the_others_go_on(self):
        """Control: end at the first that is missing; 10 must not win over 4."""
        one = self.made(outcome="FAIL")
        two = self.made(serial_number="B")
        line = ["get", one, NOBODY, two, "--exit-status"]
        ran = self.fails(4, *line, "--json")
        ids = [run["id"] for run in ran.json["data"]]
        self.assertEqual(ids, [one, two])
        self.assertIn(NOBODY, ran.error["message"])
        ran = self.fails(4, *line, "-q")
        self.assertEqual(ran.out.split(), [one, two])
        self.assertIn(NOBODY, ran.err)
        ran = self.fails(4, *line, "--format", "csv")
        self.assertEqual(ran.out.count("\n"), 1)    # these runs have no measurements

    def test_a_failure_other_than_a_missing_run_ends_it(self):
        one = self.made()
        self.box.fault("status", "GET /v2/runs/{id}", times=None, skip=1)
        ran = self.fails(6, "get", one, one, *ONCE, "--json")
        self.assertEqual(len(ran.json["data"]), 1)

    def test_an_id_of_a_wrong_form_is_not_found(self):
        run_id = self.made()
        for line in (
                f"get --id {run_id[:-1]}",
                "update-metadata --id x --set a=1",
                "attachments finalize --id x",
                f"rm --ids {run_id} x"):
            ran = self.fails(4, *line.split())
            self.assertIn("no ", ran.err)
        self.assertIn("no run x (400)", ran.err)
        self.assertIn("ls --serial-numbers x -q", ran.err)
        ran = self.fails(4, "get", run_id[1:])
        self.assertIn("get --serial-number " + run_id[1:], ran.err)
        self.assertIn("has 35 characters", ran.err)
        self.assertEqual(self.stored(), [run_id])

    def measurements(self, format, *words):
        """(header, rows) of get in a format that is made of rows."""
        out = self.ok("get", *words, "--format", format).out
        if format == "csv":
            header, *rows = csv.reader(io.StringIO(out))
            return header, rows
        rows = [json.loads(line) for line in out.splitlines()]
        return list(rows[0]), [list(row.values()) for row in rows]

    def test_measurements_are_the_rows_of_a_spreadsheet(self):
        """Control: write a row for each run."""
        ids = [self.made(**report_of(serial)) for serial in ("A", "B")]
        names = ("run_id serial_number procedure started_at phase attempt name value units limits "
                 "outcome")
        limits = "x >= 3.1, x <= 3.4"
        for format, attempt, value, series in (
                ("csv", "2", "3.52", "3 points"),
                ("jsonl", 2, 3.52, [[0, 1, 2], [5, 7, 6]])):
            header, rows = self.measurements(format, *ids)
            self.assertEqual(header, names.split())
            first, _, third, *second_run = rows
            self.assertEqual(first[0], ids[0])
            self.assertEqual(first[4:7], ["Power on", attempt, "vcc"])
            self.assertEqual(first[7:], [value, "V", limits, "FAIL"])
            self.assertEqual(third[6:8], ["i", series])
            self.assertEqual([row[0] for row in second_run], [ids[1]] * 3)

    def test_columns_make_it_a_row_for_each_run_again(self):
        run_id = self.made(**REPORTED)
        header, rows = self.measurements("csv", run_id, "--columns", "id,unit.serial_number")
        self.assertEqual(header, ["id", "unit.serial_number"])
        self.assertEqual(rows, [[run_id, "SN-0001"]])

    def test_columns_of_measurements_can_be_asked_for_and_those_of_their_run_beside_them(self):
        """Control: take every --columns for columns of runs: `value` is in none of the rows."""
        run_id = self.made(**REPORTED)
        names = "id,unit.serial_number,procedure.name,metadata.shift,name,outcome,value"
        header, rows = self.measurements("csv", run_id, "--columns", names)
        self.assertEqual(header, names.split(","))
        self.assertEqual(rows[0], [run_id, "SN-0001", "Burn-in", "A", "vcc", "FAIL", "3.52"])
        ran = self.ok("get", run_id, "--columns", "name,limits")
        self.assertEqual(ran.out.splitlines()[:2], ["name\tlimits", "vcc\tx >= 3.1, x <= 3.4"])
        self.assertEqual(ran.err, "")

    def test_failed_only_holds_for_the_rows_of_a_spreadsheet_too(self):
        """Control: leave failed_only out of rows_of."""
        run_id = self.made(**REPORTED)
        for more in ((), ("--columns", "serial_number,name,outcome")):
            for format in ("csv", "jsonl"):
                words = [run_id, "--failed-only", *more]
                header, rows = self.measurements(format, *words)
                found = [dict(zip(header, row)) for row in rows]
                self.assertEqual([row["name"] for row in found], ["vcc"])

    def test_runs_without_a_failed_measurement_are_told_with_a_few_serials(self):
        """Control: leave note_failures out, or its bound of three."""
        ids = [self.made(**report_of("F"))]
        for number in range(5):
            ids.append(self.made(serial_number=f"SN-{number}"))
        ran = self.ok("get", *ids, "--failed-only", "--format", "csv")
        self.assertIn("no failed measurement in 5 of 6 runs: SN-0 SN-1 SN-2 ...\n", ran.err)
        ran = self.ok("get", *ids[:2], "--failed-only", "--out", "a.xlsx")
        self.assertIn("no failed measurement in 1 of 2 runs: SN-0\n", ran.err)
        self.assertEqual(self.ok("get", *ids, "--format", "csv").err, "")

    def test_what_is_no_id_may_be_a_serial_number_or_a_part_of_one(self):
        """Control: in no_such_id leave list out; the hint and the strip of the serial."""
        ran = self.fails(4, "ls", "--ids", "00042")
        self.assertIn("is it a serial number?", ran.err)
        self.assertIn("ls --serial-numbers 00042", ran.err)
        ran = self.fails(4, "get", "--serial-number", "43 ")
        self.assertIn("ls --search-query 43 ", ran.err)
        run_id = self.made()
        self.assertEqual(self.ok("get", "--serial-number", "SN-0001 ", "-q").out, run_id + "\n")

    def test_log_lines_have_the_time_of_this_machine_on_a_terminal_and_their_own_in_a_pipe(self):
        """Control: leave log_time out."""
        row = dict(LOG, timestamp="2026-05-19T08:00:01.250Z")
        pipe = runs.Screen(io.StringIO())
        self.assertIn(row["timestamp"], runs.log_lines([row], pipe, True)[-1])
        local = runs.local_time(row["timestamp"]).isoformat(" ", "milliseconds")
        line = runs.log_lines([row], runs.Screen(Terminal()), True)[-1]
        self.assertIn(f"{local[:23]} {local[23:]}  INFO", line)

    def test_all_measurements_of_listed_runs_go_into_one_workbook(self):
        for serial in ("00042", "B"):
            self.made(**report_of(serial))
        ids = self.ok("ls", "--outcomes", "FAIL", "--all", "-q").out
        self.ok("get", "--ids", "-", "--format", "xlsx", "--out", "m.xlsx", input=ids.encode())
        with zipfile.ZipFile("m.xlsx") as archive:
            self.assertIsNone(archive.testzip())
            sheet = archive.read("xl/worksheets/sheet1.xml").decode()
        self.assertEqual(sheet.count("<row>"), 1 + 2 * 3)
        for cell in (">00042<", "<v>3.52</v>", ">x &gt;= 3.1, x &lt;= 3.4<", ">3 points<",
                     '<c s="2"><v>46161'):
            self.assertIn(cell, sheet)
        self.assertIn("--out", self.fails(2, "ls", "--format", "xlsx", tty=True).err)

    def test_the_ending_of_a_name_says_the_format_unless_one_is_given(self):
        """Control: leave format_of_name out, or let it win."""
        run_id = self.made()
        for words, name, begin in (
                (["ls"], "a.XLSX", b"PK"), (["ls", "--format", "csv"], "a.xlsx", b'"id'),
                (["ls", "--json"], "a.xlsx", b"{"), (["ls"], "a.csv", b'"id"'),
                (["ls"], "a.json", b'{"data": ['), (["ls"], "a.jsonl", b'{"id"'),
                (["ls", "--format", "table"], "a.csv", b"ID\t"), (["ls"], "a.txt", b"ID\t"),
                (["ls"], "a.table", b"ID\t"), (["get", run_id], "a.json", b'{\n  "id"'),
                (["get", run_id, "--dry-run"], "a.csv", b'{"method": "GET"'),
                (["create", "--example"], "a.json", b'{\n  "outcome"')):
            self.ok(*words, "--out", name)
            self.assertEqual(content(name)[:len(begin)], begin, (words, name))

    def test_a_format_that_a_name_says_hides_no_note(self):
        """Control: make the Console with call.format."""
        self.made()
        self.made(serial_number="SN-2")
        ran = self.ok("ls", "--limit", "1", "--out", "a.json")
        self.assertIn("1 shown, more exist", ran.err)

    def test_older_spreadsheets_are_told_what_is_written_instead(self):
        """Control: without the refusal the file has tabs, and a spreadsheet complains."""
        for name in ("a.xls", "a.ODS"):
            self.assertIn("write a.xlsx", self.fails(2, "ls", "--out", name).err)
        self.ok("ls", "--format", "csv", "--out", "a.xls")

    def test_download_saves_all_files_under_safe_names_and_overwrites_none(self):
        run_id = self.made()
        long_name = "\u6e2c" * 90
        for number, name in enumerate(("../x", "CON", "a:b", "a:b", "ok.txt", long_name)):
            self.put(run_id, name, b"%d" % number)
        os.mkdir("to")
        self.file("to/ok.txt", b"mine")
        self.ok("get", run_id, "--download", "to")
        self.assertEqual(os.listdir("."), ["to"])
        found = content("to")
        self.assertEqual(found.pop(runs.safe_name(long_name)), b"5")
        expected = {
            ".._x": b"0",
            "_CON": b"1",
            "a_b": b"2",
            "a_b-2": b"3",
            "ok.txt": b"mine",
            "ok-2.txt": b"4"}
        self.assertEqual(found, expected)

    def test_a_file_that_cannot_be_saved_does_not_keep_the_others_from_it(self):
        """Control: let the first failure end the downloads."""
        run_id = self.made()
        for name in ("a.txt", "b.txt", "c.txt"):
            self.put(run_id, name, name.encode())
        self.box.fault("status", "GET /storage/{id}", times=1, status=404, body=b"<Error/>")
        ran = self.fails(6, "get", run_id, "--download", "to", *ONCE)
        self.assertEqual(content("to"), {"b.txt": b"b.txt", "c.txt": b"c.txt"})
        self.assertIn("SN-0001", ran.out)       # the report itself is there

    def test_an_upload_that_was_never_finished_is_told(self):
        run_id = self.made()
        self.client().create_attachment(run_id, "a.txt")
        self.assertIn("a.txt has no content", self.ok("get", run_id, "--download", "to").err)

    def test_odd_data_anywhere_never_stops_a_report(self):
        """Control: take a field's type for granted in the report."""
        run = self.whole()
        screen = runs.Screen(io.StringIO())
        for copy in oddities(run):
            for failed_only in (False, True):
                show_logs = not failed_only
                lines = runs.run_report(copy, screen, None, failed_only, show_logs)
                self.assertNotIn("\x1b", "\n".join(lines))
            rows = runs.measurement_rows(copy, with_points=True)
            runs.dump_json(rows)

    def test_odd_data_goes_through_each_form_of_output(self):
        run = self.whole()
        forms = itertools.cycle(["--logs", "--failed-only", "--format=csv"])
        terminals = itertools.cycle([False, True])
        for odd, form, tty in zip(ODD_VALUES, forms, terminals):
            answer = dict(run, phases=odd, unit=odd)
            with mock.patch.object(runs.Client, "get", return_value=answer):
                ran = self.ok("get", "x", form, tty=tty)
            self.assertEqual(ran.err, "")
            self.assertNotIn("\x1b[2J", ran.out)

    def test_odd_data_anywhere_never_stops_a_list(self):
        self.made(metadata={"shift": "A"}, batch_number="B")
        row = self.client().list(include_metadata=True)["data"][0]
        rows = list(oddities(row))
        for number, copy in enumerate(rows):
            copy["id"] = str(number)
        self.says("GET /v2/runs", {"data": rows, "meta": {}})
        for words in ("", "--format csv", "--summary", "-q"):
            for tty in (False, True):
                ran = self.ok("ls", *words.split(), tty=tty)
                self.assertEqual(ran.err, "")
                if not words:
                    lines = ran.out.splitlines()
                    self.assertEqual(len(lines), len(rows) + 1)

    def test_an_odd_size_never_stops_a_download_and_a_wrong_one_is_told(self):
        """The file has 4 bytes."""
        for size in ODD_VALUES + (4, 3, 5):
            self.shows(self.box.url + "/storage/x", size=size)
            is_wrong = not isinstance(size, bool) and size in (7, 3, 5)
            self.fails(6 if is_wrong else 0, "get", "a", "--download", "to", *ONCE)

    def test_a_name_of_many_characters_is_quick(self):
        """Control: cut by measuring the whole text again and again."""
        run_id = self.made(phases=[dict(FULL["phases"][0], sequence_path=None,
                                        name="\u6e2c" * 80000)])
        calls = []
        real = runs.character_width
        with mock.patch.object(runs, "character_width", lambda c: calls.append(1) or real(c)):
            self.ok("get", run_id, tty=True)
        self.assertLess(len(calls), 10 * 80000)


# ---- tests: commands that write ------------------------------------------------------------------

class Creating(Case):
    """create without a queue."""

    def test_a_list_of_another_form_ends_no_create_that_is_stored(self):
        """Control: Client.list without read_page: KeyError, and the ID is told nowhere."""
        self.says("GET /v2/runs", {"runs": []})
        ran = self.ok(*CREATE)
        self.assertIn("Created run", ran.out)
        self.assertEqual(self.fails(6, "get", "--serial-number", "A").out, "")

    def test_the_same_create_twice_is_one_run_and_another_content_another(self):
        local = ["--started-at", "2026-05-19T10:00:00.0+02:00", "--ended-at", END]
        failed = json.dumps(dict(BODY, outcome="FAIL"))
        for words in (
                CREATE,
                UNIT + local,
                ["create", "--body", json.dumps(BODY)],
                ["create", "--body", failed, "--outcome", "pass"]):
            run_id = self.ok(*words, "-q").out.strip()
            self.assertEqual(self.stored(), [run_id])
            _, _, _, body = self.sent("POST")[0]
            self.assertEqual(body["client_run_ref"], PLAIN_REF)
        self.ok(*CREATE, "--docstring", "x")
        self.assertEqual(len(self.stored()), 2)
        self.sent()
        self.ok(*CREATE, "--client-run-ref", "mine")
        _, _, _, body = self.sent("POST")[0]
        self.assertEqual(body["client_run_ref"], "mine")
        self.assertEqual(len(self.stored()), 3)

    def test_a_run_that_was_there_already_is_told_as_such(self):
        """Control: tell every run as created. Nothing is asked for where nobody reads it."""
        self.assertTrue(self.ok(*CREATE).out.startswith("Created run"))
        self.box.store.db.execute("UPDATE runs SET created_at = created_at - 3600000")
        self.assertTrue(self.ok(*CREATE).out.startswith("Already there: run"))
        self.sent()
        for more in ("-q", "--json"):
            self.ok(*CREATE, more)
            self.assertEqual(len(self.sent()), 1)
        self.box.fault("status", "GET /v2/runs", times=None)    # only this is not known then
        self.assertTrue(self.ok(*CREATE, *ONCE).out.startswith("Created run"))

    def test_a_time_far_in_the_future_is_warned_of(self):
        line = CREATE[:-1] + ["2099-01-01T00:00:00Z"]
        self.assertIn("warning: ", self.ok(*line).err)
        self.assertEqual(self.ok(*line, "--json").err, "")

    def test_a_field_that_is_not_known_is_sent_with_a_warning(self):
        ran = self.ok("create", "--body", json.dumps(dict(BODY, colour="red")))
        self.assertIn("warning: colour: unknown field", ran.err)
        self.assertEqual(self.sent("POST")[0][3]["colour"], "red")

    def test_dry_run_needs_no_key_and_sends_nothing(self):
        self.file("a.txt")
        env = {"TOFUPILOT_API_KEY": "", "TOFUPILOT_URL": "https://other.example.com/api/"}
        ran = self.ok(*CREATE, "--attach", "a.txt", "--dry-run", env=env)
        first, *others = [json.loads(line) for line in ran.out.splitlines()]
        self.assertEqual(first["method"], "POST")
        self.assertEqual(first["url"], "https://other.example.com/api/v2/runs")
        self.assertEqual(first["body"], dict(BODY, client_run_ref=PLAIN_REF))
        methods = [row["method"] for row in others if row["method"] != "GET"]
        self.assertEqual(methods, ["POST", "PUT", "POST", "PATCH"])
        for line in ("ls --all", "rm --ids a", "get --id a --json", "get --serial-number S"):
            out = self.ok(*line.split(), "--dry-run", env=env).out
            json.loads(out.splitlines()[0])
        self.fails(2, *UNIT, "--dry-run", env=env)
        self.assertEqual(self.sent(), [])

    def test_the_example_is_taken_by_the_server_as_it_is(self):
        """Control: change a name in EXAMPLE_RUN. The sandbox knows the unit PSU-0001."""
        body = json.loads(self.ok("create", "--example").out)
        self.assertEqual(self.ok("create", "--example", "--json").json, body)
        nothing = {"TOFUPILOT_API_KEY": "", "TOFUPILOT_URL": CLOSED}
        self.ok("create", "--example", "--out", "run.json", env=nothing)
        self.assertEqual(self.sent(), [])
        ran = self.ok("create", "--body", "@run.json")
        self.assertEqual(ran.err, "")
        run = self.client().get(self.stored()[0])
        values = []
        for phase in run["phases"]:
            values += [row.get("measured_value") for row in phase["measurements"]]
        self.assertEqual(values, [3.31, "1.4.0", True, 17.1, None])
        sub_unit, = run["sub_units"]
        self.assertEqual(sub_unit["serial_number"], "PSU-0001")
        self.assertEqual(run["metadata"], body["metadata"])
        self.assertEqual(len(run["logs"]), 1)

    def test_quiet_prints_nothing_of_an_example(self):
        """Control: take it for a run without an ID, which is null."""
        self.assertEqual(self.ok("create", "--example", "-q").out, "")

    def test_a_procedure_that_is_not_there_is_told_with_how_to_find_its_id(self):
        """Control: tell people to correct the data, and not with what."""
        for id, status in (("Burn-in", 5), (NOBODY, 4)):
            ran = self.fails(status, *create("A", procedure=id))
            self.assertIn("ls --columns procedure.name,procedure.id", ran.err)

    def test_a_sub_unit_without_a_run_is_told_with_what_to_do(self):
        ran = self.fails(4, *CREATE, "--sub-units", "NEW-1")
        self.assertIn("needs a run of its own first", ran.err)

    def test_moving_times_are_for_creates_with_a_reference_of_their_own(self):
        """Control: read them in every create: the same command again makes another run."""
        for word in ("now", "90s", "today", "2026-05-19"):
            ran = self.fails(2, *UNIT, "--started-at", word, "--ended-at", END)
            self.assertRegex(ran.err, "another run|has no time of day")
            body = dict(BODY, started_at=word)
            self.fails(2, "create", "--body", json.dumps(body))
        self.assertEqual(self.sent(), [])
        times = ["--started-at", "90s", "--ended-at", "now"]
        self.ok(*UNIT, *times, "--client-run-ref", "mine")
        _, _, _, body = self.sent("POST")[0]
        start = runs.epoch(body["started_at"])
        end = runs.epoch(body["ended_at"])
        self.assertAlmostEqual(end - start, 90, delta=1)

    def test_a_reference_of_ones_own_does_not_stand_for_the_times(self):
        ran = self.fails(2, *UNIT, "--client-run-ref", "R", "--json")
        self.assertEqual(sorted(ran.error["issues"]),
                         ["--ended-at: missing", "--started-at: missing"])
        self.fails(2, *UNIT, "--client-run-ref", "R", "--started-at", BEGIN)
        self.assertEqual(self.sent(), [])

    def test_a_run_over_the_change_to_winter_time_is_stored(self):
        """Control: take every local time in its first reading."""
        line = [*UNIT, "--started-at", "2026-11-01T01:58:30", "--ended-at", "2026-11-01T01:01:10"]
        self.run_script(*line, status=0, env={"TZ": NEW_YORK})
        body = self.sent("POST")[0][3]
        self.assertEqual(body["started_at"], "2026-11-01T01:58:30-04:00")
        self.assertEqual(body["ended_at"], "2026-11-01T01:01:10-05:00")

    def test_the_flags_override_the_body(self):
        body = json.dumps(dict(BODY, metadata={"a": 1, "b": 2}, part_number="X"))
        self.ok("create", "--body", "-", "--part-number", "P", "--set", "b=3", "c=x",
                input=body.encode("utf-16"))
        sent = self.sent("POST")[0][3]
        self.assertEqual(sent["part_number"], "P")
        self.assertEqual(sent["metadata"], {"a": 1, "b": 3, "c": "x"})

    def test_what_is_created_is_told_in_short(self):
        body = json.dumps(body_with())
        text = self.ok("create", "--body", body).out
        for word in (self.stored()[0], "PASS", "SN-0001", "2 phases, 1 measurement", "42s"):
            self.assertIn(word, text)


class Metadata(Case):
    """update-metadata: keys are set and deleted, the others stay."""

    def test_keys_are_set_and_deleted_and_the_others_stay(self):
        run_id = self.made(metadata={"a": 1, "b": 2, "lot": "x"})
        text = self.ok("update-metadata", run_id, "--set", "a=5", "c=1.10", "--unset", "b").out
        self.assertIn("set a, c", text)
        self.assertIn("unset b", text)
        self.ok("update-metadata", "--id", run_id, "--metadata", '{"lot": null, "d": true}')
        self.assertEqual(self.client().get(run_id)["metadata"], {"a": 5, "c": "1.10", "d": True})

    def test_commas_in_place_of_points_or_spaces_are_a_warning(self):
        """Control: leave warn_of_commas out of one of the commands."""
        run_id = self.made()
        for command in (["update-metadata", run_id], CREATE):
            for word, told in (("t=24,5", "text; a number has a point: t=24.5"),
                               ("a=1,b=2", "is one key; several are separated by spaces")):
                self.assertIn(f"--set {word} ", self.ok(*command, "--set", word).err)
                self.assertIn(told, self.ok(*command, "--set", word).err)
            self.assertEqual(self.ok(*command, "--set", "a=x, y", "b=24.5").err, "")
        for name in ("serial-numbers", "part-numbers"):
            self.assertIn("separate", self.ok("ls", "--" + name, "A,B").err)
        self.assertIn("by spaces", self.fails(4, "get", f"{run_id},{run_id}").err)
        self.assertIn("by spaces", self.fails(2, *CREATE, "--attach", "a.png,b.txt").err)

    def test_metadata_of_a_wrong_form_is_told_beside_set_and_unset_too(self):
        """Control: take what is false for no metadata, or look for keys in whatever it is."""
        for metadata in ("[]", "0", "false"):
            for more in (["--set", "b=1"], ["--unset", "b"]):
                ran = self.fails(2, "update-metadata", NOBODY, "--metadata", metadata, *more)
                self.assertIn("--metadata: must be a JSON object", ran.err)
        self.assertEqual(self.sent(), [])

    def test_one_key_cannot_be_set_and_deleted(self):
        """Control: let one of them win unseen."""
        for words in (
                ["--set", "a=1", "--unset", "a"],
                ["--metadata", '{"a": 1}', "--unset", "a"],
                ["--metadata", '{"a": null}', "--unset", "b", "a"]):
            ran = self.fails(2, "update-metadata", NOBODY, *words)
            self.assertIn("a", ran.err)
        self.assertEqual(self.sent(), [])

    def test_a_value_of_a_wrong_form_is_told_with_its_path(self):
        for metadata, told in (
                ('{"a": {}}', "metadata.a: "),
                ('{"a b": 1}', "metadata.a b: "),
                ("3", "--metadata: must be a JSON object"),
                ("[]", "--metadata"),
                ("true", "--metadata"),
                ('"x"', "--metadata"),
                ('{"a": NaN}', "metadata.a: ")):
            ran = self.fails(2, "update-metadata", NOBODY, "--metadata", metadata)
            self.assertIn(told, ran.err)


class Deleting(Case):
    """rm: what is gone, what was not there, and what failed on the way."""

    def test_many_ids_are_deleted_100_a_request_with_one_result(self):
        self.box.store.fill(250)
        ids = self.stored()
        self.file("ids.txt", "\n".join(ids).encode())
        ran = self.ok("rm", "--ids", "@ids.txt", "--json")
        self.assertEqual(ran.json, {"id": ids})
        counts = [len(query) for _, _, query, _ in self.sent()]
        self.assertEqual(counts, [100, 100, 50])
        self.assertEqual(self.stored(), [])

    def test_it_says_which_are_gone_and_which_were_not_there(self):
        run_id = self.made()
        gone, missing = self.ok("rm", NOBODY, run_id).out.split("Not there")
        self.assertIn(run_id, gone)
        self.assertIn(NOBODY, missing)
        self.assertIn("Fix: copy whole IDs", self.fails(4, "rm", "--ids", NOBODY).err)
        self.says("DELETE /v2/runs", {"id": "no list"})
        self.fails(6, "rm", "--ids", NOBODY)

    def test_an_id_of_a_wrong_form_behind_others_tells_what_is_gone(self):
        self.box.store.fill(101)
        ids = self.stored()
        ran = self.fails(4, "rm", "--ids", *ids[:100], "x", ids[100])
        self.assertIn("no run x (400)", ran.err)
        self.assertIn("100 of 102 runs were deleted", ran.err)
        self.assertEqual(self.stored(), ids[100:])

    def test_a_404_after_a_try_without_an_answer_counts_as_deleted(self):
        run_id = self.made()
        self.box.fault("drop-after", "DELETE /v2/runs")
        ran = self.ok("rm", "--ids", run_id, "-q")
        self.assertEqual(ran.out.strip(), run_id)
        self.assertEqual(self.stored(), [])

    def test_a_request_that_fails_after_others_tells_what_is_gone(self):
        """Control: with the free try taken for one, the unknown IDs count as deleted."""
        self.box.store.fill(101)
        ids = self.stored()
        unknown = [NOBODY[:-2] + str(number) for number in range(10, 60)]
        self.box.fault("drop-before", "DELETE /v2/runs", skip=1)    # its connection was dead
        ran = self.ok("rm", "--json", "--ids", *ids[:100], *unknown)
        self.assertEqual(ran.json, {"id": ids[:100]})
        self.box.store.fill(100)
        ids = self.stored()
        self.box.fault("status", "DELETE /v2/runs", skip=1)
        ran = self.fails(6, "rm", *ONCE, "--ids", *ids)
        self.assertIn("100 of 101 runs were deleted", ran.err)
        self.assertEqual(self.stored(), ids[100:])

    def test_on_a_terminal_it_asks_first(self):
        run_id = self.made()
        for typed in (b"n\n", b"\n", b"\x04"):
            status, text = self.terminal("rm", "--ids", run_id, answer=typed)
            self.assertEqual(status, 130, text)
            self.assertEqual(self.stored(), [run_id], text)
            self.assertIn("Delete 1 run", text)
        self.assertEqual(self.terminal("rm", "--ids", run_id, answer=b"y\n")[0], 0)
        self.assertEqual(self.stored(), [])
        self.assertEqual(self.terminal("rm", "--yes", "--ids", run_id)[0], 4)


class StationCheck(Case):
    """check: a line for each thing that a station needs, each with its own fault."""

    def faults(self, status, *words, **more):
        """{name: (text, hint)} of the lines of check that are not ok; it exits with status."""
        rows = self.fails(status, "check", "--json", *words, **more).json["data"]
        found = {}
        for row in rows:
            if not row["ok"]:
                self.assertEqual(row["error"]["type"], "error")
                found[row["name"]] = row["text"], row["error"]["hint"]
        return found

    def test_each_wait_of_check_is_announced(self):
        """Control: leave notify as Station has it."""
        self.says("GET /v2/whoami", {"message": "later"}, status=503, times=1)
        self.assertIn("next try in", self.ok("check").err)

    def test_a_dry_run_of_check_shows_its_request(self):
        """Control: a DryRun that is no Transport has no proxy_for."""
        ran = self.ok("check", "--dry-run")
        self.assertIn("/v2/whoami", ran.out)
        self.assertEqual(self.sent(), [])

    def test_a_station_that_is_set_up_is_told_with_all_that_it_has(self):
        out = self.ok("check").out
        words = [line.split() for line in out.splitlines()]
        marks = {line[0] for line in words}
        self.assertEqual(marks, {"ok"})
        names = [line[1] for line in words]
        expected = ("version sha256 python path openssl url key proxy ca queue zone identity "
                    "clock")
        self.assertEqual(names, expected.split())
        for word in (self.box.url, "environment TOFUPILOT_API_KEY", "ada@sandbox.example",
                     "s from the server's", "none at"):
            self.assertIn(word, out)
        self.assertNotIn(self.box.user_key, out)
        request, = self.sent()
        self.assertEqual(request[:2], ("GET", "/v2/whoami"))
        self.assertFalse(os.path.exists(self.env["TOFUPILOT_HOME"]))

    def test_the_key_of_a_station_is_told_as_such(self):
        ran = self.ok("check", env={"TOFUPILOT_API_KEY": self.box.station_key})
        self.assertIn("station Station 4 of Sandbox", ran.out)

    def test_a_server_that_is_too_old_for_the_question_is_no_fault(self):
        """Control: take the 404 for a failure, with an empty Fix."""
        self.box.fault("status", "GET /v2/whoami", times=None, status=404)
        ran = self.ok("check")
        self.assertNotIn("FAIL", ran.out)
        self.assertIn("older than API 2.22", ran.out)
        self.assertEqual([request[1] for request in self.sent()], ["/v2/whoami", "/v2/runs"])
        self.box.fault("status", "GET /v2/runs", times=None, status=401)
        self.assertEqual(list(self.faults(3)), ["identity"])

    def test_a_wrong_key_or_none_or_no_server_exits_as_any_command_would(self):
        for env, status, name in (({"TOFUPILOT_API_KEY": ""}, 3, "key"),
                                  ({"TOFUPILOT_API_KEY": "wrong-key-3f9c"}, 3, "identity"),
                                  ({"TOFUPILOT_API_KEY": "a b c d e f g"}, 3, "key"),
                                  ({"TOFUPILOT_URL": CLOSED}, 6, "identity"),
                                  ({"TOFUPILOT_URL": "ftp://x"}, 2, "url")):
            found = self.faults(status, *ONCE, env=env)
            self.assertIn(name, found, env)
            self.assertTrue(found[name][1])
            self.assertEqual(self.fails(status, "check", *ONCE, env=env).out.count("FAIL"),
                             len(found))

    def test_a_key_file_that_cannot_be_used_is_told_on_its_line_and_the_others_go_on(self):
        """Control: let the file be read before the first line."""
        os.chmod(self.file("key", self.box.user_key.encode()), 0o644)
        found = self.faults(3, "--api-key-file", self.at("none"))
        self.assertEqual(list(found), ["key"])
        self.assertIn(self.at("none"), found["key"][0])
        self.assertEqual(self.sent(), [])       # another key would prove nothing
        if POSIX:
            found = self.faults(3, "--api-key-file", "key")
            self.assertIn("other users", found["key"][0])
            self.assertEqual(len(self.sent()), 1)

    def test_each_line_holds_its_facts_apart(self):
        """Control: join the lines of a message with spaces."""
        ran = self.fails(6, "check", *ONCE, "--url", CLOSED)
        self.assertRegex(ran.out, "cannot reach 127.0.0.1:1: .*; proxy: none\n      Fix: .*--url")
        ran = self.fails(3, "check", env={"TOFUPILOT_API_KEY": ""})
        self.assertRegex(ran.out, "Fix: .*=<key>\n      cron|Fix: .*=<key>\n      the Task")

    def test_a_clock_that_is_wrong_is_told(self):
        """Control: compare nothing, or the wrong way round."""
        for shift, word in ((-3600, "ahead of"), (3600, "behind")):
            self.box.store.clock = lambda shift=shift: time.time() + shift
            found = self.faults(2)
            self.assertEqual(list(found), ["clock"])
            self.assertRegex(found["clock"][0], fr"(3599|3600|3601) s {word} the server")

    def test_a_ca_file_that_cannot_be_loaded_is_told_on_its_line(self):
        for path in (self.at("none.pem"), self.file("ca.pem", b"x")):
            found = self.faults(2, "--ca-cert", path)
            self.assertIn("ca", found)
            self.assertIn(path, found["ca"][0])

    def test_a_python_without_ssl_or_sqlite3_is_told(self):
        """Control: tell the version alone."""
        self.ok(*CREATE, "--offline", "--queue", "q")
        for module, name in (("ssl", "openssl"), ("sqlite3", "queue")):
            with mock.patch.dict(sys.modules, {module: None}):
                found = self.faults(6, "--queue", "q")
            self.assertEqual(list(found), [name])
            self.assertIn(module, found[name][0])

    def test_a_queue_whose_oldest_run_waits_since_more_than_a_day_is_a_fault(self):
        """Control: tell the count alone."""
        self.ok(*CREATE, "--offline", "--queue", "q")
        self.assertIn("1 waiting", self.ok("check", "--queue", "q").out)
        with contextlib.closing(sqlite3.connect("q")) as database:
            database.execute("UPDATE entry SET stored_at = stored_at - 100000")
            database.commit()
        found = self.faults(6, "--queue", "q")
        self.assertRegex(found["queue"][0], "oldest .*27h ago")

    def test_a_queue_with_runs_for_another_server_or_parked_ones_is_a_fault(self):
        self.ok(*CREATE, "--offline", "--queue", "q", "--url", "https://other.example.com")
        self.assertIn("https://other.example.com", self.faults(6, "--queue", "q")["queue"][0])
        self.fails(5, *create("a b"), "--offline", "--queue", "q2")
        text, hint = self.faults(5, "--queue", "q2")["queue"]
        self.assertIn("1 parked", text)
        self.assertIn("--queue q2", hint)

    def test_check_exits_as_its_first_failure_does(self):
        found = self.faults(2, *ONCE, "--ca-cert", self.at("none.pem"), "--queue", "q",
                            env={"TOFUPILOT_URL": CLOSED})
        self.assertEqual(list(found), ["ca", "identity"])


# ---- tests: command line -------------------------------------------------------------------------

# Command lines that are refused, and what the message tells if not the name of the last flag.
WRONG_VALUES = """
ls --outcomes PASSED > --outcomes PASS
ls --started-after soon > --started-after 'soon'
ls --started-after 2026-02-30 > --started-after '2026-02-30'
ls --started-after 25.11.2026 > --started-after 2026-11-25T08:00:00
ls --limit 0
ls --limit=-5
ls --limit 1.5
ls --limit 5 --all > --limit --all
ls --ended-before 2026-02-30T00:00Z
ls --created-after 2026-05-19T08:00+25:00
ls --duration-min 5x
ls --page-size 101
ls --page-size 0
ls --cursor x
ls --sort-by date
ls --sort-order up
ls --include-metadata maybe
ls --timeout 0
ls --timeout 5s
ls --retries x
ls --retries=-1
ls --ids=
ls --ids ..
ls --metadata {s:A}
ls --metadata true
ls --metadata 3
ls --metadata []
ls --metadata 1e999
ls --metadata {"n":{"gte":NaN}} > --metadata
ls --metadata {"a":1,"b":1,"c":1,"d":1,"e":1,"f":1} > --metadata 5
ls --metadata {"a":{"eq":1,"eq":2}} > --metadata "eq" twice
ls --outcomes , > --outcomes
ls --serial-numbers -A1 > =
ls --ids - --serial-numbers - > --ids --serial-numbers
ls --columns id outcome > --columns id,outcome
ls --columns id, foo > --columns id,foo
get a --columns id metadata.lot > --columns id,metadata.lot
get a --columns id value -q > --columns id,value
ls --started-after -7d > --started-after minus
ls --started-after=-7d > --started-after minus
rm --all > rm --ids ls --all
rm --outcomes FAIL > rm --ids ls --outcomes
get --started-after 7d > get --ids ls --started-after
get --outcome PASS > ls --outcomes -q
rm --serial-number A > ls --serial-numbers -q
update-metadata a --serial-number A > ls --serial-numbers -q
update-metadata a --outcome PASS > cannot be changed
update a --part-number A > cannot be changed
ls --set a=1 > update-metadata
get a --download run.json > --download folder
create --sub-units > --sub-units ""
update-metadata a --set lot = L8 > --set lot spaces
update-metadata a --metadata {'shift':'C'} > --metadata JSON has double quotes
create --outcome PASS --started-at 2026-05-19 > --started-at time of day
create --outcome PASS --started-at now > --started-at repetition
get --id=
get --id .
get --id ..
get a --id b > --ids
get > RUN_ID
update --attachments= --id .. > --attachments
update --id a --attachments=
update --id a --attachments ..
update > --id
update a b > b
update-metadata --id a --set x
update-metadata --id a --set =1
update-metadata --id a --metadata []
update-metadata --id a --metadata 3
update-metadata --id a --metadata {"k":1,"k":2} > "k" twice
update-metadata --id a --set k\x1b=1 > k
update-metadata --id a > --metadata --set
attachments finalize --id ..
attachments initialize --name=
attachments initialize > --name
create-attachment --id a --name=
create-attachment --id a > --file
rm --ids=
rm --ids @none.txt > --ids none
rm --ids - --api-key-file - > --ids --api-key-file
rm > RUN_ID
create --body [1]
create --body 3
create --body @none.json > --body none.json
create --body {"outcome":"FAIL","outcome":"PASS"} > "outcome" twice
create --body run.json > --body
queue fix > REF
create-attachment a foto.png > --file foto.png
create-attachment a --file a.png b.png > --file b.png
ls --metadata {"lot":"L7"} > metadata.lot: {"in":
ls --metadata lot=L7 > --metadata {"shift":{"in":["A"]}}
update-metadata a lot=3 > --set lot=3
queue move no/ > no/ stick
create --body none.json > --body @none.json
create --outcome OK --procedure-id p > PASS
ls --outcomes NOK > FAIL
ls --format excel > xlsx
queue ls a > a
queue send q > --queue
check q > q"""
MISTYPED = """      # and the word that is suggested
list > ls
runs list > ls
delete > rm
runs delete --ids a > rm
status > check
logs > get
atachments finalize > attachments
attachments finalise --id a > finalize
queue list > ls
get --i a > --ids
create --serial X > --serial-number
create --part X > --part-number
create --procedure X > --procedure-id
create --status PASS > --outcome
create --outcom PASS > --outcome
create --metadat {} > --metadata
create --phase [] > --phases
create --file a > --attach
ls --since 24h > --started-after
ls --limi 5 > --limit
ls --serial X > --serial-numbers
ls --part X > --part-numbers
ls --batch X > --batch-numbers
ls --procedure X > --procedure-ids
ls --output f > --out
ls -o f.csv > --out
ls -o json > --format
ls --failed > --outcomes
get --failed > --failed-only
get --serial-numbers A > --serial-number
ls -L 5 > --limit
ls -n 5 > --limit
ls --status FAIL > --outcomes
ls --query X > --search-query
ls --station X > --created-by-station-ids
ls --operator X > --operated-by-ids
ls --started-afer 24h > --started-after
ls --sort x > --sort-by
ls --token x > --api-key-file
--jsno ls > --json"""
WRONG_CREATES = (
        (["--outcome", "PASSED"], "--outcome", "PASS"),
        (["--procedure-id", ""],),
        (["--phases", ""],),
        (["--serial-number", "x" * 61],),
        (["--part-number", "a b"],),
        (["--operated-by", " "],),
        (["--sub-units", "ok", "\u00e9"], "--sub-units", "\u00e9"),
        (["--phases", "{}"],),
        (["--slot-key", "a"], "--slot-key", "execution_id"),
        (["--unit-metadata", "[]"],),
        (["--metadata", "{a:1}"], "--metadata", "--set"),
        (["--set", "a b=1"], "metadata.a b"),
        (["--phases", "[" * 99999],),
        (["--phases", "[" * 900 + "]" * 900], "phases"),
        (["--phases=--"],),
        (["--phases", "-", "--logs", "-"], "--phases", "--logs"),
        (["--phases", '[{"name":"a","name":"b"}]'], '"name"', "twice"),
        (["--docstring", "\udcff"],),
        (["--queue", ""],),
        (["--attach", "f.txt", "to/f.txt"], "f.txt", "twice"),
        (["--attach", "f.txt", "--attach", "f.txt"], "f.txt", "twice"))


def lines_of(table):
    """(words, told) of each line of a table above."""
    for line in table.splitlines()[1:]:
        command, _, told = line.partition(" > ")
        yield command.split(), told.split()


class WrongCommandLines(Case):
    """All of it ends with exit 2 and a message, before anything reaches the server."""

    def refused(self, words, *told):
        """The error of a command line, which tells these words."""
        ran = self.inside(*words, "--json", input=b"[]")
        self.assertEqual(ran.status, 2, (words[-5:], ran))
        self.assertEqual(ran.out, "")
        self.assertEqual(self.sent(), [])
        error = ran.error
        keys = "code exit_code hint issues message status type"
        self.assertEqual(sorted(error), keys.split())
        self.assertEqual(error["type"], "error")
        self.assertEqual(error["exit_code"], 2)
        lines = [error["message"], error["hint"] or ""]
        lines += error["issues"]
        text = "\n".join(lines)
        for word in told:
            self.assertIn(word, text, words)
        return error

    def test_a_wrong_value_is_refused_with_the_name_of_its_flag(self):
        self.file("run.json")
        for words, told in lines_of(WRONG_VALUES):
            flags = re.findall(r"--[a-z-]+", " ".join(words))
            self.refused(words, *told or flags[-1:])

    def test_a_wrong_flag_of_a_create_is_refused_with_its_name(self):
        os.mkdir("to")
        self.file("f.txt")
        self.file("to/f.txt")
        for words, *told in WRONG_CREATES:
            self.refused(CREATE + words, *told or [words[0].rstrip("-=")])

    def test_a_path_inside_json_is_told_as_a_path(self):
        body = body_with({"outcome": "OK"})
        body["metadata"] = {"a": {}}
        error = self.refused(["create", "--body", json.dumps(body), "--part-number", "a b"])
        first, *others = [issue.split(": ")[0] for issue in error["issues"]]
        self.assertEqual(first, "--part-number")
        self.assertEqual(sorted(others), ["metadata.a", MEASUREMENT_PATH + ".outcome"])

    def test_a_mistyped_word_is_told_with_the_right_one_before_what_is_missing(self):
        """Control: let argparse tell the missing flags first, or difflib guess alone."""
        for words, (meant,) in lines_of(MISTYPED):
            error = self.refused(words)
            self.assertRegex(error["hint"], f"did you mean {meant}\\?")
            self.assertNotIn("missing", error["message"])

    def test_where_nothing_fits_there_is_no_guess(self):
        """Control: take the closest word whatever it is."""
        for line in ("frobnicate", "queue frobnicate", "ls --xyzzy 3", "ls -x", "login"):
            self.assertNotIn("did you mean", self.refused(line.split())["hint"])
        self.assertIn("TOFUPILOT_API_KEY", self.refused(["login"])["hint"])

    def test_flags_are_not_abbreviated(self):
        """Control: allow_abbrev."""
        for line in ("ls --se X", "ls --serial-n X", "ls --lim 5", "ls --js", "ls --dry"):
            self.assertIn("unknown option", self.refused(line.split())["message"])
        for words in (["--attac", "f.txt"], ["--se", "a=1"], ["--queu", "q"]):
            self.assertIn("unknown option", self.refused(CREATE + words)["message"])

    def test_an_empty_value_is_told_as_empty(self):
        """Control: take it for a flag that was not given, or for no filter at all."""
        for line in ("ls --outcomes=", "ls --serial-numbers=", "ls --part-numbers=", "ls --ids=",
                     "ls --search-query=", "ls --operated-by-names=", "ls --started-after=",
                     "ls --limit=", "ls --columns=", "ls --out=", "ls --url=", "get --ids=",
                     "get --serial-number=", "create --serial-number=", "create --body=",
                     "update-metadata a --unset=", "update-metadata a --metadata=",
                     "check --queue="):
            error = self.refused(line.split())
            text = error["message"] + " ".join(error["issues"])
            self.assertIn("empty", text, line)

    def test_a_wrong_value_is_refused_also_where_the_command_does_not_use_it(self):
        """Control: check a flag only when its value is asked for."""
        self.ok(*CREATE, "--offline", *QUEUE)
        for line in ("ls --format pdf", "queue ls --queue q --timeout x",
                     "create --example --timeout x", "queue ls --queue q --retries x"):
            self.refused(line.split(), line.split()[-2])

    def test_a_file_without_its_flag_is_told_with_the_flag(self):
        self.file("run.json", json.dumps(BODY).encode())
        self.file("foto.png")
        self.assertIn("--attach foto.png", self.refused(["create", "foto.png"])["hint"])
        for line in ("create run.json", "create other.json"):
            self.assertIn(f"--body @{line.split()[1]}", self.refused(line.split())["hint"])
        self.assertIn("--body @run.json",
                      self.refused(["create", "--body", "run.json"])["hint"])

    def test_a_folder_in_place_of_a_queue_is_told_with_a_file_in_it(self):
        """Control: tell the rights and the room on the disk."""
        os.mkdir("folder")
        error = self.fails(6, "queue", "ls", "--queue", "folder").err
        self.assertIn("--queue " + self.at("folder", "line3.queue"), error)

    def test_ids_and_files_may_follow_the_columns(self):
        """Control: take any word with a dot for a column."""
        run_id = self.made()
        self.file("ids.txt", run_id.encode())
        for words in ([run_id], ["@ids.txt"]):
            self.assertIn(run_id, self.ok("get", "--columns", "id,outcome", *words).out)
        self.ok(*CREATE, "--offline", "--queue", "q")
        self.ok("queue", "move", "--queue", "q", "--columns", "moved", "line3.queue")

    def test_a_list_that_is_empty_is_told_with_its_file(self):
        """Control: take it for no filter. The list of a day without failures is empty."""
        self.file("my-ids.txt", b"\r\n")
        error = self.refused(["get", "@my-ids.txt"], "--ids: @my-ids.txt is empty")
        self.assertIn("no run matched", error["hint"])
        self.assertIn("--ids: stdin is empty", self.fails(2, "rm", "-").err)

    def test_a_file_of_ids_without_its_at_sign_is_told_with_it(self):
        """Control: take it for a serial number."""
        self.file("old.txt", self.made().encode())
        for command in ("get", "rm"):
            self.assertIn("did you mean @old.txt?", self.fails(4, command, "old.txt").err)
        self.ok("rm", "@old.txt")

    def test_an_empty_word_makes_an_empty_list_of_sub_units(self):
        """Control: take it for a serial number that is empty. It overrides those of a body."""
        body = json.dumps(dict(BODY, sub_units=["X-1"]))
        self.ok("create", "--body", body, "--sub-units", "")
        sent, = self.sent("POST")
        self.assertEqual(sent[3]["sub_units"], [])

    def test_a_word_too_many_is_refused(self):
        """queue send FILE would send another queue."""
        self.ok(*CREATE, "--offline", *QUEUE)
        for line in ("queue ls q", "queue send q", "check q", "ls SN-1", "update a b"):
            self.refused(line.split(), line.split()[-1])
        self.assertIn("queue move", self.refused(["queue"])["hint"])
        self.assertEqual(self.stored(), [])

    def test_all_problems_are_told_at_once(self):
        error = self.refused(["create", "--outcome", "NO", "--started-at", "x"])
        self.assertEqual([issue.split(":")[0] for issue in error["issues"]], [
            "--outcome", "--started-at", "--procedure-id", "--serial-number", "--ended-at"])
        text = self.fails(2, "create").err
        self.assertTrue(text.startswith("error: "), text)
        for flag in "--outcome --procedure-id --serial-number --started-at --ended-at".split():
            self.assertIn(flag, text)

    def test_a_body_without_any_required_field_is_told_with_the_names_that_were_meant(self):
        """Control: tell the five flags alone. A queue stores nothing of it."""
        body = {"serialNumber": "A", "phases": [{"value": 1}]}
        for more in ((), QUEUE):
            error = self.refused(["create", "--body", json.dumps(body), *more])
            self.assertIn("serialNumber: unknown field, did you mean serial_number?",
                          error["issues"])
            self.assertIn("--outcome: missing", error["issues"])
            self.assertIn("create --example", error["hint"])
        self.assertFalse(os.path.exists("q"))

    def test_what_is_wrong_in_json_is_told_with_its_place_and_a_hint_that_fits(self):
        """Control: tell people who gave a file to put the JSON into a file."""
        for data, told in (
                (b'{\n "a": 1\n "b": 2}', "line 3, column 2"),
                (b'{\n "a": "M\xfcller"}', "line 2, column 9.*0xfc"),
                (b'{"a": 3,31}', "line 1, column 9.*a decimal point, not a comma"),
                (b"{'a': 1}", "line 1, column 2.*JSON has double quotes"),
                (b'{"a": None}', "line 1, column 7.*true, false and null"),
                (b'{"a": [1, nan]}', "line 1, column 11.*nan")):
            path = self.file("run.json", data)
            for word, place in (("@" + path, "run.json"), ("-", "stdin")):
                for flag in ("--body", "--metadata"):
                    ran = self.fails(2, *CREATE, flag, word, input=data)
                    self.assertRegex(ran.err, told)
                    self.assertIn(flag, ran.err)
                    self.assertIn(place, ran.err)
                    self.assertNotIn("put the JSON in a file", ran.err)

    def test_the_hint_for_wrong_json_names_set_where_there_is_such_a_flag(self):
        error = self.refused([*CREATE, "--metadata", "{shift:A}"])
        self.assertIn("--set", error["hint"])
        error = self.refused(["ls", "--metadata", "{shift:A}"])
        self.assertNotIn("--set", error["hint"])

    def test_nan_in_json_is_told_with_its_path(self):
        """Control: refuse it while reading, without a place."""
        data = json.dumps(body_with({"measured_value": math.nan, "lower_limit": -math.inf}))
        error = self.refused(["create", "--body", data])
        for issue, name in zip(error["issues"], ("measured_value", "lower_limit")):
            self.assertTrue(issue.startswith(f"{MEASUREMENT_PATH}.{name}: "), issue)

    def test_a_nul_in_a_list_is_refused_as_no_serial_number_has_one(self):
        """Control: PowerShell's UTF-16 without a mark reads as no match: never tested."""
        self.file("ids.txt", b"SN-1\nSN\0-2\n")
        for line in ("ls --serial-numbers @ids.txt --fail-empty", "rm @ids.txt", "get @ids.txt"):
            self.refused(line.split(), "NUL")

    def test_text_that_is_no_utf8_in_a_list_is_told_with_its_place(self):
        self.file("ids.txt", b"SN-1\nSN-\xfc\n")
        self.refused(["ls", "--serial-numbers", "@ids.txt"], "line 2, column 4", "ids.txt")

    def test_stdin_stands_once_in_a_command(self):
        for line in ("get - -", "rm - -", "ls --ids - --ids -"):
            self.refused(line.split(), "stdin")


class CommandLine(Case):
    """What a flag means, where it stands, and what is said about failures."""

    def test_a_sandbox_whose_port_is_busy_names_the_command_for_another(self):
        """Control: name the flag alone, which make does not take."""
        port = int(self.box.url.rpartition(":")[2])
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            self.assertEqual(serve(["--port", str(port)]), 1)
        command = f"python3 test_tofupilot_runs.py serve --port {port % 65535 + 1}"
        self.assertIn(command, told.getvalue())

    def test_a_server_of_this_machine_without_its_scheme_is_told_with_it(self):
        """Control: leave the question for this machine out of parse_origin."""
        for host in ("127.0.0.1:8788", "localhost", "localhost:8788"):
            ran = self.fails(2, "ls", "--url", host)
            self.assertIn(f"did you mean --url http://{host}?", ran.err)

    def test_commands_without_a_run_id_say_how_it_is_given(self):
        """Control: leave the check out of run_rm."""
        self.assertIn("get RUN_ID", self.fails(2, "get").err)
        self.assertIn("rm RUN_ID", self.fails(2, "rm").err)

    def test_flags_without_a_command_are_told(self):
        """Control: take the None of argparse for a word."""
        error = self.fails(2, "--json").error
        self.assertEqual(error["message"], "a command is missing")
        self.assertIn("a command is missing", self.fails(2, "-q").err)

    def test_stdin_that_cannot_be_read_is_told(self):
        """Control: read stdin outside of the try: make room, or check the path."""
        with open("f", "w") as file:
            ran = self.run_script("create", "--body", "-", status=2, stdin=file, input=None)
        self.assertIn("--body: cannot read stdin", ran.err)

    def test_global_flags_stand_anywhere_and_in_any_case(self):
        self.ok(*CREATE, "--offline", *QUEUE)
        found = self.ok("queue", "--json", "ls", *QUEUE).json
        self.assertEqual(len(found["data"]), 1)
        self.ok("runs", "--json", "ls")
        ran = self.fails(4, "get", "--id", NOBODY, "--format", "JSON")
        self.assertEqual(ran.error["status"], 404)
        parser = runs.Parser("ls", prog="x", color=None)    # as 3.14 calls it
        self.assertEqual(parser.path, "ls")

    def test_text_inside_values_decides_nothing(self):
        """Control: look for --json, or for create, in the text of a word."""
        ran = self.fails(5, *create("a1"), "--set", "note=use --json", "--procedure-id",
                         self.box.unlinked_procedure_id, "--deployment-id", "no-such")
        self.assertTrue(ran.err.startswith("error: "), ran)
        for words in (["--search-query=--json"], ["--search-query", "x --format json"]):
            self.box.fault("status", "GET /v2/runs")
            ran = self.fails(6, "ls", *words, *ONCE)
            self.assertTrue(ran.err.startswith("error: "), ran)

    def test_a_ctrl_c_is_told_by_the_command_and_not_by_its_words(self):
        """Control: look for the word create in the command line."""
        for line, is_create in (
                (["ls", "--search-query", "create"], False),
                (["update-metadata", NOBODY, "--set", "create=1"], False),
                (CREATE, True),
                (["runs"] + CREATE, True)):
            with mock.patch.object(runs.Transport, "exchange", side_effect=KeyboardInterrupt):
                ran = self.fails(130, *line, "--json")
            self.assertEqual("may be stored" in ran.error["message"], is_create, line)

    def test_each_failure_has_its_message_its_object_and_its_status(self):
        run_id = self.made()
        new = " ".join(create("A"))
        for line, env, status, message, hint in (
                ("update-metadata --id x --metadata {a:1}", {}, 2,
                 "is not JSON(.|\n)*removed the double quotes", "--set"),
                ("ls", {"TOFUPILOT_API_KEY": ""}, 3, "no API key", "--api-key-file"),
                ("ls", {"TOFUPILOT_API_KEY": "wrong-key-3f9c"}, 3, r"ending \.\.\.3f9c \(401\)",
                 "check the key"),
                (new, {"TOFUPILOT_URL": CLOSED}, 6, "cannot reach",
                 "nothing was sent(.|\n)*--queue FILE"),
                (f"get {run_id[:-1]}", {}, 4, "no run " + run_id[:-1], "copy the whole ID")):
            self.told(status, line.split(), message, hint, env)

    def test_each_answer_of_a_server_has_its_message_too(self):
        path = self.file("scope.png")
        issue = {"path": ["phases", 1], "message": "odd"}
        refusal = {"status": 422, "body": {"message": "no", "issues": [issue]}}
        for line, faults, status, message, hint in (
                (create("A"), [("status", "POST /v2/runs", refusal)], 5, "422: no",
                 "correct the data"),
                (create("A"), [("drop-after", "POST /v2/runs", {}),
                               ("status", "GET /v2/whoami", {})], 6, "may be stored or not",
                 "again"),
                (create("B", "--attach", path), [("status", "PUT .*", {})], 6,
                 r"is stored, 1 of 1 attachments not: scope\.png", "only what is missing")):
            self.told(status, line, message, hint, {}, faults)

    def told(self, status, line, message, hint, env, faults=()):
        """The failure of a command tells message and hint, for people and as JSON."""
        for form in ((), ("--json",)):
            self.box.calm()
            for kind, match, options in faults:
                self.box.fault(kind, match, times=None, **options)
            ran = self.fails(status, *line, "--retries", "1", *form, env=env)
            if form:
                error = ran.error
                self.assertRegex(error["message"], message)
                self.assertRegex(error["hint"] or "", hint)
                self.assertEqual(ran.out, "")
                self.assertEqual(error["exit_code"], status)
            else:
                self.assertRegex(ran.err, "(^|\n)error: ")
                self.assertRegex(ran.err, message)
                self.assertRegex(ran.err, hint)

    def test_each_command_loads_only_what_it_needs(self):
        costly = {"ssl", "sqlite3", "urllib.request", "http.client", "csv", "zipfile", "hashlib"}
        self.ok(*CREATE, "--offline", *QUEUE)
        storing = {"sqlite3"}
        if not any(map(importlib.util.find_spec, ("_sha2", "_sha256"))):
            storing.add("hashlib")      # some systems build Python so
        for words, loads in (
                (["--help"], set()),
                (["ls", "--help"], set()),
                (["--version"], {"ssl", "hashlib"}),
                (["queue", "ls", *QUEUE], {"sqlite3"}),
                ([*CREATE, "--offline", *QUEUE], storing),
                (["ls"], {"ssl", "urllib.request", "http.client", "hashlib"})):
            code = (f"import sys; sys.path.insert(0, {HERE!r}); import tofupilot_runs as t; "
                    f"t.main({words!r}); print('LOADED', *sys.modules)")
            ran = self.ended(self.popen(sys.executable, "-I", "-S", "-B", "-c", code), 0)
            loaded = set(ran.out.rpartition("LOADED")[2].split())
            self.assertLessEqual(loaded & costly, loads, words)

    def test_on_windows_attach_expands_patterns(self):
        """Control: leave glob out. Elsewhere the shell has done it, and * is a name."""
        for name in ("a.txt", "b.txt"):
            self.file(name)
        call = runs.parse([*CREATE, "--attach", "*.txt"])
        for on_windows, expected in ((True, ["a.txt", "b.txt"]), (False, ["*.txt"])):
            with mock.patch.object(runs, "ON_WINDOWS", on_windows):
                self.assertEqual(runs.attached_paths(call), expected)


# ---- tests: main ---------------------------------------------------------------------------------

class OutputThatHolds(Case):
    """Text of the world in all fields, and streams that are closed, full or narrow."""

    def setUp(self):
        super().setUp()
        row = {"name": WORLD, "outcome": "FAIL", "measured_value": WORLD, "units": WORLD}
        phase = dict(FULL["phases"][0], name=WORLD, sequence_path=None, measurements=[row])
        self.run_id = self.made(
            docstring=WORLD, operated_by=WORLD, slot_key=WORLD, slot_name=WORLD, execution_id=WORLD,
            metadata={"k": WORLD}, logs=FULL["logs"], phases=[phase])

    def test_no_encoding_or_locale_stops_what_is_shown(self):
        columns = ["ls", "--columns", "docstring"]
        for encoding in ("cp1252", "ascii", ""):
            env = {"PYTHONIOENCODING": encoding}
            if not encoding:
                env.update(LC_ALL="C", LANG="")
            for words, status in (
                    (columns, 0),
                    (["get", self.run_id, "--logs"], 0),
                    (columns + ["--format=csv"], 0),
                    (["ls", "--serial-numbers", WORLD, "--fail-empty"], 4)):
                ran = self.ended(self.popen(sys.executable, SCRIPT, *words, env=env), status)
                if encoding and "docstring" in words:
                    shown = WORLD.encode(encoding, "backslashreplace")
                    self.assertIn(shown.decode("utf-8", "replace"), ran.out)

    def test_no_locale_changes_what_is_sent(self):
        plain = {"LC_ALL": "C", "LANG": ""}
        line = [*CREATE, "--docstring", WORLD, "--queue", WORLD]
        self.run_script(*line, status=0, env=plain)
        _, _, _, body = self.sent("POST")[-1]
        self.assertEqual(body["docstring"], WORLD)
        self.assertIn(WORLD, os.listdir(self.folder))
        self.run_script("ls", "--serial-numbers", WORLD, status=0, env=plain)
        _, _, query, _ = self.sent()[-1]
        self.assertIn(("serial_numbers", WORLD), query)

    def test_a_reader_that_leaves_is_no_failure(self):
        self.box.store.fill(300)
        left = threading.Event()

        def hold(record):
            if "cursor" in record.query:
                left.wait(20)
        self.box.on_request = hold
        with self.start("ls", "--all") as process:
            process.stdout.readline()
            process.stdout.close()
            left.set()
            self.assertEqual(process.wait(60), 0)
            self.assertEqual(process.stderr.read(), b"")

    def test_a_full_disk_is_told(self):
        for line in ("ls", "ls --json", f"get --id {self.run_id}", "--help", "--version"):
            with unwritable() as full:
                ran = self.run_script(*line.split(), status=1, stdout=full)
            self.assertRegex(ran.err, "cannot write.*(space|Bad file descriptor)")
            expected = 1 if "--json" in line else 2
            self.assertEqual(ran.err.count("\n"), expected, ran.err)

    def test_a_wrong_name_after_out_is_no_closed_pipe(self):
        """Control: forgive EINVAL whatever it is about: exit 0, no file, no message."""
        error = OSError(errno.EINVAL, "Invalid argument")
        with mock.patch.object(runs, "ON_WINDOWS", True):
            self.assertTrue(runs.is_closed_pipe(error))
            error.filename = "a?b"
            self.assertFalse(runs.is_closed_pipe(error))
        error.filename = None
        with mock.patch.object(runs, "ON_WINDOWS", False):
            self.assertFalse(runs.is_closed_pipe(error))
        os.mkdir("folder")
        for path in ("folder", os.path.join("none", "r.csv")):
            for more in ((), ("--json",)):
                ran = self.fails(2, "ls", "--out", path, *more)
                self.assertIn(path.split(os.sep)[0], ran.err)
        self.assertEqual(self.sent(), [])

    def test_a_terminal_gets_a_table_that_fits_with_colour_on_outcomes_alone(self):
        status, text = self.terminal("ls")
        self.assertEqual(status, 0)
        plain = re.sub("\x1b\\[\\d*m", "", text)
        self.assertIn(self.run_id, plain)
        self.assertLess(max(map(len, plain.splitlines())), 80)
        coloured = re.findall("\x1b\\[32m(.*?) *\x1b\\[0m", text)
        self.assertEqual(coloured, ["PASS"])
        self.assertEqual(text.count("\x1b"), 2)
        for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            text = self.terminal("ls", **env)[1]
            self.assertNotIn("\x1b", text)
        self.assertNotIn("\x1b", self.ok("ls").out)
        text = self.terminal("get", self.run_id)[1]
        self.assertIn("\x1b[31mFAIL", text)


# ---- hostile servers -----------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;own\x07\x9b31m\u202e\u2066\u200b\ufeff\r\n\t\x7f\ud800"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066\ufeff\ud800-\udfff]")
EMPTY = b'{"data":[],"meta":{"has_more":false,"next_cursor":null}}'
FILE = {"id": "att_9", "name": "a.txt", "size": 4, "content_type": "text/plain"}
OTHER_HOST = "api.example"      # a name that only a proxy of these tests can reach
PASSWORD = "s3cret"
ADDRESSES = socket.getaddrinfo
HOW_TO_TELL = ((), ("-v",), ("--json",))
ATTACHED = ("get", "--id", "a", "--download", "into")


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy: CONNECT opens a tunnel to `target`, other requests go on to it as they are.

    `heads` has the head of each request. With `reply`, a function of the head, it answers itself.
    """
    daemon_threads = True

    def __init__(self, case, target, reply=None):
        super().__init__(("127.0.0.1", 0), self.serve)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.target = target
        self.reply = reply
        self.heads = []
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()
        case.addCleanup(self.server_close)
        case.addCleanup(self.shutdown)

    def handle_error(self, *_):
        """Nothing: the client has closed its connection."""

    def serve(self, connection, address, server):
        head = connection.recv(65536)
        while b"\r\n\r\n" not in head:      # Python 3.8 sends it in pieces
            head += connection.recv(65536)
        self.heads.append(head.decode("latin-1"))
        if self.reply:
            connection.sendall(self.reply(head))
            return
        host, _, port = self.target.rpartition(":")
        with socket.create_connection((host, int(port))) as target:
            if head.startswith(b"CONNECT"):
                connection.sendall(b"HTTP/1.1 200 Go\r\n\r\n")
            else:
                target.sendall(head)
            back = threading.Thread(target=self.pipe, args=(target, connection), daemon=True)
            back.start()
            self.pipe(connection, target)

    def pipe(self, source, target):
        with contextlib.suppress(OSError):
            for block in iter(lambda: source.recv(65536), b""):
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)

    def methods(self):
        """The methods of the requests that came."""
        return [head.split()[0] for head in self.heads]


def change(value, to):
    """JSON with to(leaf) in the place of each leaf."""
    if isinstance(value, dict):
        return {key: change(item, to) for key, item in value.items()}
    if isinstance(value, list):
        return [change(item, to) for item in value]
    return to(value)


def made_evil(value):
    """A text with EVIL before it; any other value as it is."""
    if isinstance(value, str):
        return EVIL + value
    return value


def raw_answer(body, *lines, status="200 OK"):
    """The bytes of an HTTP answer, with these header lines."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", *lines]
    if not any(line.startswith(("Content-Length", "Transfer")) for line in lines):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines + ["", ""]).encode("latin-1") + body


class HostileCase(Case):
    """A Case with a word for what most of these tests ask."""

    def tells(self, status, text, *args, **more):
        """fails(), with this text on stderr. Returns the Ran."""
        ran = self.fails(status, *args, **more)
        self.assertIn(text, ran.err)
        return ran


class SecretCase(HostileCase):
    """Tests of failures: none may show, log or leave behind a key, a password or a signature.

    All that main() wrote is looked at when it ends, all files in the test's folder when the test
    ends: the queue, what was saved, half-written files. Files that the test made are not.
    """

    def setUp(self):
        super().setUp()
        self.own = set()
        self.secrets = {self.box.user_key, PASSWORD}
        self.addCleanup(self.look_at_files)

    def file(self, name, content=b"content\n"):
        path = super().file(name, content)
        self.own.add(path)
        return path

    def inside(self, *args, **more):
        ran = super().inside(*args, **more)
        self.look_at(ran.out + ran.err, args)
        self.assertNotRegex(ran.err, "(?i)signature=[0-9a-f]", args)
        return ran

    def ended(self, process, *args, **more):
        ran = super().ended(process, *args, **more)
        self.look_at(ran.out + ran.err, process.args)
        return ran

    def look_at(self, text, what):
        """Asserts that a text has no secret, in any of the forms in which it goes over a wire."""
        for secret in self.secrets:
            login = base64.b64encode(f"user:{secret}".encode()).decode()
            in_json = json.dumps(secret)[1:-1]
            in_a_url = quote(secret, safe="")
            for form in (secret, in_json, in_a_url, login):
                place = text.find(form)
                around = text[max(0, place - 200):place + 200]
                self.assertLess(place, 0, (what, around))

    def look_at_files(self):
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                is_regular = os.path.isfile(path) and not os.path.islink(path)
                if is_regular and path not in self.own:
                    data = content(path).decode("latin-1")
                    self.look_at(data, path)
                    self.assertNotIn("signature=", data, path)


class HostileServers(SecretCase):
    """Redirects, odd URLs of the storage, broken and endless answers."""

    def test_no_redirect_is_followed_and_each_is_told_with_its_target(self):
        """Control: urllib's own handler sends the key along for GET, and POST turns into GET."""
        other = self.another()
        path = self.file("a.txt")
        rows = [
            ("GET /v2/runs", ["ls"]),
            ("POST /v2/runs", CREATE),
            ("DELETE /v2/runs", ["rm", "--ids", "a"]),
            ("PATCH .*", ["update-metadata", "--id", "a", "--set", "a=1"]),
            ("PUT /storage/{id}", CREATE + ["--attach", path]),
            ("GET /storage/y", ATTACHED)]
        for status in (301, 302, 303, 307, 308):
            for match, args in rows:
                self.shows(self.box.url + "/storage/y?signature=abc")
                self.box.fault("redirect", match, status=status, location=other.url + "/x?k=1")
                ran = self.fails(6, *args)
                self.assertIn(other.host, ran.err)
                self.assertNotIn("k=1", ran.err)
        self.assertEqual(other.connections, 0)

    def test_a_storage_url_that_is_no_acceptable_address_is_never_opened(self):
        """Upload and download URLs obey the rule of the API's own URL."""
        other = self.another()
        path = self.file("a.txt")
        urls = ["file://" + path, "ftp://{0}/x", "data:text/plain,x", "http://user:pw@{0}/x",
                "http://{0}/a b", "http://{0}/\x01", "http://{0}/\n", " http://{0}/", "//{0}/x",
                "http://{0}/\u00e9", "http://{0}\\@localhost/", "http:///x", "http://[::1/",
                "http://{0}9999/x?signature=5", "", None, 5, "http://storage.example/x",
                "http://10.0.0.1/x", "http://127.0.0.1.example/x", "http://localhost@10.0.0.1/x"]
        with mock.patch.object(socket, "getaddrinfo", self.only_this_machine):
            for url in urls:
                if isinstance(url, str):
                    url = url.format(other.host)
                self.says("POST /v2/attachments", {"id": "att_9", "upload_url": url})
                told = self.fails(6, *CREATE, "--attach", path).err
                if url:
                    self.shows(url)
                    told += self.fails(6, *ATTACHED).err
                self.assertNotRegex(told, "pw@|signature=5")
        self.assertEqual(other.connections, 0)
        self.assertEqual(content("into") or {}, {})

    def only_this_machine(self, host, *args, **more):
        """A socket.getaddrinfo for tests in which no other machine may be asked for."""
        self.assertEqual(host, "127.0.0.1")
        return ADDRESSES(host, *args, **more)

    def test_plain_http_to_a_storage_elsewhere_needs_allow_http(self):
        """Control: a rule that looks at the API's own URL lets a file out of a test setup."""
        asked = []

        def stay_here(host, port, *args, **more):
            asked.append(host)
            return ADDRESSES("127.0.0.1", port, *args, **more)
        url = self.box.url.replace("127.0.0.1", "storage.example") + "/storage/x"
        self.shows(url)
        with mock.patch.object(socket, "getaddrinfo", stay_here):
            self.fails(6, *ATTACHED)
            self.assertNotIn("storage.example", asked)
            self.ok(*ATTACHED, "--allow-http")
        self.assertIn("storage.example", asked)
        self.assertEqual(content("into"), {"a.txt": b"data"})

    def test_whatever_a_broken_server_says_ends_with_exit_6_and_one_message(self):
        answers = [
            raw_answer(EMPTY, "Content-Encoding: gzip"),
            raw_answer(EMPTY, "Content-Encoding: identity, br"),
            raw_answer(EMPTY, "Content-Length: 3000000000"),
            raw_answer(EMPTY[:-5], "Content-Length: 0x99"),
            raw_answer(b"zz\r\n" + EMPTY, "Transfer-Encoding: chunked"),
            raw_answer(b"ff\r\n" + EMPTY, "Transfer-Encoding: chunked"),
            raw_answer(EMPTY, "X: " + "x" * 100000),
            raw_answer(EMPTY, *["X: y"] * 200),
            b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n",
            b"HTTP/1.1 999 x\r\n\r\n"]
        if hasattr(sys, "get_int_max_str_digits"):      # else it is a number like others
            answers.append(raw_answer(EMPTY.replace(b"null", b"7" * 100000)))
        for data in answers:
            self.box.calm()
            self.box.fault("raw", "GET /v2/runs", times=None, data=data)
            ran = self.fails(6, "ls", *ONCE)
            self.assertLess(len(ran.err), 1000, data[:150])

    def test_an_answer_counts_up_to_its_bound_and_not_a_byte_beyond(self):
        """Control: `>=` in place of `>`, or no bound, in Transport.read."""
        limits = mock.patch.multiple(runs, ANSWER_LIMIT=len(EMPTY) + 9, ERROR_LIMIT=100)
        with limits:
            self.says("GET /v2/runs", EMPTY + 9 * b" ")
            self.ok("ls")
            self.says("GET /v2/runs", EMPTY + 10 * b" ")
            self.tells(6, "more than 0 KiB", "ls", *ONCE)
            for status in (400, 500):
                error = b'{"message":"odd"}'
                self.says("GET /v2/runs", error.ljust(100), status)
                self.assertIn("odd", self.inside("ls", *ONCE).err)
                self.says("GET /v2/runs", error.ljust(101), status)
                self.assertNotIn("odd", self.fails(6, "ls", *ONCE).err)
        self.says(ANY, {"message": "x" * 10000000}, 500)
        self.assertLess(len(self.fails(6, "ls", *ONCE).err), 1000)

    def test_a_server_that_never_comes_to_an_end_is_left_in_time(self):
        """Control: without the timer over each exchange. No time-out of a socket sees a drip."""
        deaf = socket.socket()      # it accepts a connection, and never reads or writes
        self.addCleanup(deaf.close)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(5)
        host = f"127.0.0.1:{deaf.getsockname()[1]}"
        urls = ["http://" + host, "https://" + host]
        drips = [(raw_answer(b"", "Content-Length: 999999"), b" "),
                 (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
                 (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
                 (raw_answer(b"", "Transfer-Encoding: chunked"), b"1\r\n \r\n")]
        for data, forever in drips:
            box = self.another()
            box.fault("raw", times=None, data=data, forever=forever)
            urls.append(box.url)
        with contextlib.closing(multiprocessing.pool.ThreadPool(len(urls))) as pool:
            for text in pool.map(self.failure_of, urls):
                self.assertRegex(text, "^(no answer from|cannot reach) 127.0.0.1:.* within 0")

    def failure_of(self, url):
        with contextlib.closing(runs.Client(url, "some-key-1", timeout=0.2, retries=0)) as client:
            with self.assertRaises(runs.Unavailable) as caught:
                client.list()
        return caught.exception.message

    def test_a_proxy_that_drips_before_tls_begins_is_left_in_time(self):
        box = self.another()
        box.fault("raw", times=None, data=b"HTTP/1.1 200 OK\r\nX: ", forever=b"x")
        ran = self.fails(6, "ls", "--url", "https://api.example", "--timeout", "0.2", *ONCE,
                         env={"HTTPS_PROXY": box.url})
        self.assertRegex(ran.err, "no complete answer|no answer within")    # the first byte is late

    def test_a_file_that_comes_larger_or_smaller_than_told_is_not_saved(self):
        """Control: without the count in fetch, the first rows are saved with exit 0."""
        url = self.box.url + "/storage/x"       # it has 4 bytes
        for size in (3, 5, 0, 1 << 39):
            self.shows(url, size=size)
            ran = self.fails(6, *ATTACHED)
            self.assertIn("not saved", ran.err)
            self.assertIn("a.txt", ran.err)
            self.assertEqual(content("into"), {})
        for size in (4, None, "4", True, -1, 4.0):      # odd ones tell nothing
            self.shows(url, size=size)
            self.ok(*ATTACHED)
        self.assertEqual(set(content("into").values()), {b"data"})

    def test_a_file_that_never_ends_is_left_once_it_is_larger_than_told(self):
        endless = raw_answer(b"x" * 100000, "Content-Length: 99999999999")
        self.shows(self.box.url + "/storage/y", size=50)
        self.box.fault("raw", "GET /storage/y", times=None, data=endless, forever=b"x")
        self.tells(6, "more came", *ATTACHED, *ONCE)
        self.assertEqual(content("into"), {})

    def test_one_attachment_that_fails_does_not_keep_the_others_from_being_saved(self):
        """Control: without the except in save_attachments nothing behind the first is saved."""
        urls = {"first.txt": "/storage/gone", "測" * 90 + ".png": "/storage/x",
                "short.txt": "/storage/x", "empty.txt": None, "last.txt": "/storage/x"}
        rows = []
        for name, path in urls.items():
            url = path and self.box.url + path
            size = 9 if name == "short.txt" else 4
            rows.append(dict(FILE, id=name, name=name, size=size, download_url=url))
        rows.insert(1, dict(FILE, id="ftp", name="ftp.txt", download_url="ftp://127.0.0.1/x"))
        self.says("GET /v2/runs/{id}", {"id": "a", "attachments": rows})
        self.box.fault("status", "GET /storage/x", times=None, status=200, body=b"data")
        self.box.fault("status", "GET /storage/gone", times=None, status=404, body=b"")
        ran = self.fails(6, *ATTACHED)
        self.assertIn("3 attachments were not saved", ran.err)
        self.assertIn("empty.txt has no content", ran.err)
        chinese, = (name for name in os.listdir("into") if name.startswith("測"))
        self.assertEqual(content("into"), {chinese: b"data", "last.txt": b"data"})
        self.assertLessEqual(len(os.fsencode(chinese)), 255)
        self.assertEqual(chinese[-4:], ".png")



class ReasonsTold(SecretCase):
    """What an answer means, and what is told of each failure of the network."""

    def judge(self, status, data=b"", kind="application/json", keys=(), **headers):
        """The error that an answer tells, or its JSON object."""
        headers["content-type"] = kind
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        try:
            return runs.read_answer(runs.Answer(status, headers, data), "a.example", keys)
        except runs.Error as error:
            return error

    def test_the_error_of_a_status_says_what_its_receiver_can_do(self):
        said = {"message": "too odd", "code": "ODD"}
        html = b"<html>"
        for status, data, kind, message, hint in (
                (400, said, runs.Refused, "answered 400: too odd", "correct the data"),
                (401, said, runs.AccessDenied, "answered 401: too odd", "check the key"),
                (403, said, runs.AccessDenied, "answered 403: too odd", "station key"),
                (404, said, runs.NotFound, "answered 404: too odd", "^$"),
                (409, said, runs.Refused, "answered 409: too odd", "correct the data"),
                (422, said, runs.Refused, "answered 422: too odd", "correct the data"),
                (418, {"error": "tea"}, runs.Refused, "answered 418: tea", "correct"),
                (400, {"error_description": "x"}, runs.Refused, "answered 400: x", "correct"),
                (413, html, runs.Refused, "the request is too large", "send less"),
                (413, said, runs.Refused, "answered 413: too odd", "send less"),
                (414, html, runs.Refused, "ask for fewer values", "correct"),
                (408, html, runs.Unavailable, "answered 408: no reason given", "again later"),
                (425, b"", runs.Unavailable, "answered 425: no reason given", "again later"),
                (429, html, runs.Unavailable, "answered 429: no reason given", "again later"),
                (500, html, runs.Unavailable, "answered 500: no reason given", "again later"),
                (503, said, runs.Unavailable, "answered 503: too odd", "again later"),
                (599, b"", runs.Unavailable, "answered 599", "again later"),
                (400, html, runs.NotTheAPI, "as the API does .400.: an error", "--url right"),
                (401, html, runs.NotTheAPI, "as the API does .401.: an error", "--url right"),
                (403, b"", runs.NotTheAPI, "as the API does .403.: an error", "--url right"),
                (404, [said], runs.NotTheAPI, "as the API does .404.: an error", "--url right"),
                (404, {"detail": "x"}, runs.NotTheAPI, "as the API does .404.", "--url right"),
                (300, said, runs.NotTheAPI, "a redirect to , not followed", "--url right"),
                (304, b"", runs.NotTheAPI, "a redirect", "--url right")):
            error = self.judge(status, data)
            self.assertIs(type(error), kind, (status, data))
            self.assertRegex(error.message, message)
            self.assertRegex(error.hint, hint)
            self.assertEqual(error.status, status)
        self.assertEqual(self.judge(422, said).code, "ODD")
        self.assertIsNone(self.judge(422, dict(said, code=5)).code)

    def test_a_success_is_one_only_if_the_api_speaks(self):
        whole = {"id": "a", "upload_url": "u"}
        for kind in ("application/json", "Application/JSON; charset=utf-8", "text/x+json",
                     "application/problem+json"):
            self.assertEqual(self.judge(200, whole, kind, ("id", "upload_url")), whole)
        for data, kind, told in (
                (b"", "application/json", ": empty"),
                (b"[]", "application/json", r"application/json, '\[\]'"),
                (b"5", "application/json", "'5'"),
                (b'{"id":NaN}', "application/json", "NaN"),
                (b'{"id":"a"', "application/json", "id"),
                (b"<html>" * 99, "text/html", "text/html, '<html>"),
                (b'{"id":"a"}', "text/html", "text/html"),
                (b'{"id":"a"}', "", "no type"),
                (b"{}", "application/json", "{}"),
                (b'{"id":""}', "application/json", "id"),
                (b'{"id":5}', "application/json", "id"),
                (b'{"id":null}', "application/json", "id")):
            error = self.judge(200, data, kind, ("id",))
            self.assertIs(type(error), runs.NotTheAPI, data)
            self.assertRegex(error.message, told)
            self.assertLess(len(error.message), 200)

    def test_the_problems_of_a_refusal_are_told_with_their_paths(self):
        issues = [{"path": ["phases", 1, "name"], "message": "odd"}, {"message": "alone"},
                  {"path": "x", "message": 5}, "no dict", None, {}]
        error = self.judge(422, {"message": "no", "issues": issues})
        self.assertEqual(error.issues, ["phases[1].name: odd", "alone", "5", "None"])
        self.assertEqual(self.judge(422, {"message": "no", "issues": "x"}).issues, [])
        long = self.judge(422, {"message": "x" * 9000})
        self.assertEqual(len(long.reason), 503)

    def test_each_failure_of_a_connection_has_its_reason(self):
        """Control: leave out any branch of Transport.reason_of."""
        transport = runs.Transport(timeout=7)
        verify = ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
        verify.verify_message = "unable to get local issuer certificate"
        name = ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] x")
        name.verify_message = "Hostname mismatch, certificate is not valid for 'a'"
        address = ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] x")
        address.verify_message = "IP address mismatch"
        for error, reason, hint, may_try_again in (
                (verify, "cannot be verified\nunable to get local", "--ca-cert.*\n.*clock|clock",
                 False),
                (name, "Hostname mismatch", "name the server in --url", False),
                (address, "IP address mismatch", "name the server in --url", False),
                (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
                 "does not speak https", "begin --url with http://", False),
                (ssl.SSLError(1, "[SSL: RECORD_LAYER_FAILURE] record layer failure"),
                 "does not speak https", "check the port", False),
                (ssl.SSLError(1, "[SSL] unknown protocol"), "does not speak https", "port", False),
                (ssl.SSLError(1, "tlsv1 alert"), "tlsv1 alert", "again later", True),
                (socket.gaierror(-2, "Name or service not known"), "name not found", "later", True),
                (socket.timeout("timed out"), "no answer within 7 s", "later", True),
                (EOFError(), "the answer was cut short", "later", True),
                (http.client.IncompleteRead(b"x"), "the answer was cut short", "later", True),
                (ConnectionRefusedError(111, "Connection refused"), "refused", "later", True),
                (http.client.BadStatusLine("odd"), "odd", "later", True),
                (ValueError(), "ValueError", "later", True),
                (OSError("x" * 999), "^x{200}$", "later", True)):
            exchange = runs.Exchange("GET", "https://a.example/x", None, None, 7, 10.5, None)
            told = transport.reason_of(exchange, error)
            self.assertRegex(told[0], reason)
            self.assertRegex(told[1], hint)
            self.assertEqual(told[2], may_try_again, error)
            exchange.late = True
            self.assertIn("no complete answer within 10 s", transport.reason_of(exchange, error)[0])

    def test_the_stage_of_an_exchange_says_whether_it_may_have_arrived(self):
        transport = runs.Transport()
        for stage, begins, maybe_sent, reused in (
                ("connecting", "cannot reach a.example:8443", False, False),
                ("sent", "no answer from a.example:8443", True, False),
                ("reused", "no answer from a.example:8443", True, True)):
            exchange = runs.Exchange("GET", "https://a.example:8443/x", None, None, 7, 9, None)
            exchange.stage = stage
            error = transport.connection_error(exchange, ConnectionResetError(104, "reset"))
            self.assertEqual((error.maybe_sent, error.reused), (maybe_sent, reused))
            self.assertTrue(error.message.startswith(begins + ": reset"), error.message)
            self.assertEqual(error.notes, [] if maybe_sent else ["proxy: none"])
            exchange.late = True
            self.assertFalse(transport.connection_error(exchange, EOFError()).reused)

    def test_an_overload_is_waited_out_whatever_its_body(self):
        """Control: without BELIEVED an HTML 429 is 'not the API', exit 6 at once."""
        for status in (408, 425, 429, 500, 503):
            for body, kind in ((b"<html>later", "text/html"),
                               (b"", ""),
                               (b"{}", "text/plain")):
                self.says("GET /v2/runs", body, status, times=1, Content_Type=kind,
                          Retry_After="0")
                self.assertIn("next try in", self.ok("ls").err)
                self.assertEqual(len(self.sent("GET")), 2)
        for args in (CREATE, ["update-metadata", "--id", self.made(), "--set", "a=1"]):
            self.says(ANY, b"<html>", 429, times=1, Content_Type="text/html", Retry_After="0")
            self.ok(*args)

    def test_a_413_is_believed_and_not_tried_again(self):
        for kind, body in (("text/html", b"<html>"),
                           ("", b""),
                           ("application/json", b"{}")):
            self.says("POST /v2/runs", body, 413, Content_Type=kind)
            ran = self.fails(5, *CREATE)
            self.assertIn("too large", ran.err)
            self.assertIn("this request has", ran.err)
            self.assertEqual(len(self.sent("POST")), 1)
        self.box.calm()
        for status, body in ((413, b""),
                             (400, b"<Error><Code>EntityTooLarge</Code></Error>")):
            self.box.fault("status", "PUT .*", status=status, body=body)
            ran = self.fails(5, *CREATE, "--docstring", str(status), "--json", "--attach",
                             self.file("a.txt"))
            self.assertIn(ran.error["id"], self.stored())
            self.assertEqual(ran.error["status"], 413)

    def test_https_to_a_port_that_speaks_plain_http_is_told_once(self):
        ran = self.fails(6, "ls", "--url", self.box.url.replace("http", "https"))
        self.assertIn("does not speak https", ran.err)
        self.assertIn("http://", ran.err)
        self.assertEqual(self.box.connections, 1)

    def test_all_addresses_of_a_host_share_the_time_of_one_request(self):
        """Control: without the remaining time in Exchange.connect six dead ones take six waits."""
        now = [1000.0]

        class Dead:
            def __init__(self, *_):
                self.wait = None

            def settimeout(self, seconds):
                self.wait = seconds

            def connect(self, where):
                now[0] += self.wait
                raise socket.timeout("timed out")

            def close(self):
                pass
        rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 443))] * 6
        for timeout in (2, 7, 30):
            now[0] = 1000.0
            with mock.patch.object(runs.time, "monotonic", lambda: now[0]), \
                    mock.patch.object(socket, "socket", Dead), \
                    mock.patch.object(socket, "getaddrinfo", lambda *_, **__: rows):
                exchange = runs.Exchange("GET", "https://a/", None, None, timeout, 1.5 * timeout,
                                         None)
                self.assertRaises(socket.timeout, exchange.connect, ("a", 443))
            self.assertLessEqual(now[0] - 1000, 1.5 * timeout)

    def test_a_host_with_a_dead_address_is_reached_by_its_next_one(self):
        port = self.box.server_address[1]
        dead = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))
        alive = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        with mock.patch.object(socket, "getaddrinfo", lambda *_, **__: [dead, alive]):
            self.assertNotIn("next try", self.ok("ls").err)
        with mock.patch.object(socket, "getaddrinfo", lambda *_, **__: [dead, dead]):
            self.tells(6, "cannot reach", "ls", *ONCE)

    def test_a_wait_is_random_and_bounded(self):
        """Control: no cap, or a `delay` that comes back to the same second on all stations."""
        for tries, asked, least, most in (
                (0, None, 0, 15),
                (1, None, 0, 30),
                (5, None, 0, 480),
                (12, None, 0, 3600),
                (10 ** 6, None, 0, 3600),
                (3, 0, 0, 8),
                (3, 10, 10, 20),
                (1, 10, 10, 20),
                (3, 3599, 3599, 3600)):
            waits = {runs.delay(tries, 15, asked) for _ in range(60)}
            self.assertGreaterEqual(min(waits), least)
            self.assertLessEqual(max(waits), most)
            if asked != 3599:
                self.assertGreater(len(waits), 40)

    def test_retry_after_is_seconds_or_a_date_of_the_servers_clock(self):
        noon = "Thu, 19 Nov 2026 12:00:00 GMT"
        for text, seconds in (
                ("7", 7),
                (" 7 ", 7),
                ("0", 0),
                ("3601", 3600),
                ("999999999", 3600),
                ("9999999999", None),
                ("-1", None),
                ("1.5", None),
                ("", None),
                ("soon", None),
                ("Thu, 19 Nov 2026 12:00:20 GMT", 20),
                ("Thu, 19 Nov 2026 11:00:00 GMT", 0),
                ("Thu, 19 Nov 2026 19:00:00 GMT", 3600),
                ("Thu, 01 Jan 99999 00:00:00 GMT", None)):
            answer = runs.Answer(503, {"retry-after": text, "date": noon}, b"")
            self.assertEqual(runs.retry_after(answer), seconds, text)
        self.assertIsNone(runs.retry_after(runs.Answer(503, {}, b"")))

    def test_the_waits_of_a_command_add_up_to_a_minute_at_most(self):
        """Control: `>=` for `>`, or no sum over the waits, in Client.perform."""
        def fail():
            raise runs.Unavailable("busy")
        for wait, count in ((20, 3),
                            (30, 2),
                            (60, 1),
                            (60.1, 0),
                            (31, 1),
                            (0, 9)):
            slept = []
            client = self.client(retries=9)
            with mock.patch.object(runs, "delay", lambda *_: wait), \
                    mock.patch.object(runs.time, "sleep", slept.append):
                self.assertRaises(runs.Unavailable, client.perform, fail)
            self.assertEqual(slept, [wait] * count)

    def test_a_wait_that_is_asked_for_is_kept_or_the_command_ends(self):
        self.says("GET /v2/runs", {"message": "busy"}, 503, Retry_After="61")
        with mock.patch.object(runs.time, "sleep", self.fail):
            client = self.client()
            self.assertRaisesRegex(runs.Unavailable, "busy$", client.list)
        self.assertEqual(len(self.sent("GET")), 1)

    def test_another_try_is_made_only_where_it_may_help(self):
        """What surely did not arrive may always go again; no other create-attachment may."""
        for args, kind, options, count in (
                (["ls"], "drop-before", {}, 4),
                (["ls"], "status", {"status": 500, "body": b"<html>"}, 4),
                (["ls"], "portal", {}, 1),
                (["ls"], "redirect", {}, 1),
                (["ls"], "status", {"status": 403, "body": b"<html>"}, 1),
                (["create-attachment", "--id", "a", "--name", "x"], "drop-before", {}, 1),
                (["create-attachment", "--id", "a", "--name", "x"], "status", {}, 1),
                (["attachments", "initialize", "--name", "x"], "status", {}, 4),
                (["attachments", "finalize", "--id", "x"], "drop-before", {}, 4),
                (["rm", "--ids", "x"], "status", {"status": 408}, 4),
                (["update-metadata", "--id", "x", "--set", "a=1"], "reset", {}, 4)):
            self.box.calm()
            self.box.fault(kind, ANY, times=None, **options)
            self.fails(6, *args)
            self.assertEqual(len(self.sent()), count, (args, kind))


    def test_nothing_is_sent_when_the_time_ran_out_in_a_handshake(self):
        """Its shutdown does not end one. Control: without the look at late it is sent."""
        exchange = runs.Exchange("POST", self.box.url + "/x", b"{}", None, 5, 5, None)

        class SlowConnection:
            sock = None

            def connect(self):
                exchange.late = True
        with self.assertRaises(EOFError):
            runs.Transport().exchange_on(SlowConnection(), exchange, None, {})
        self.assertEqual(exchange.stage, "connecting")


class HostileText(HostileCase):
    """What a server, a file name or a word holds cannot move a cursor or forge a line."""

    def clean(self, ran):
        self.assertNotRegex(ran.out + ran.err, RAW)
        return self.orderly(ran)

    def test_no_field_of_a_run_reaches_a_screen_with_control_characters(self):
        good = dict(self.whole(), metadata={"key" + EVIL: "v"})
        bad = change(good, made_evil)
        lines = {}
        for run in (good, bad):
            page = {"data": [run, dict(run, id="2")], "meta": {"has_more": False}}
            self.says("GET /v2/runs/{id}", run)
            self.box.fault("status", "GET /v2/runs", times=None, status=200, body=page)
            for line in ("get --id a --logs", "ls", "ls --summary", "ls -q", "get --id a -q",
                         "ls --columns docstring,metadata,phases,unit", "ls --format jsonl",
                         "get --id a --columns logs,unit.serial_number"):
                for tty in (False, True):
                    ran = self.ok(*line.split(), tty=tty, env={"NO_COLOR": "1"})
                    self.clean(ran)
                    tabs = [text.count("\t") for text in ran.out.splitlines()]
                    self.assertEqual(lines.setdefault((line, tty), tabs), tabs)
            for line in ("ls --format csv", "get --id a --format csv"):
                ran = self.clean(self.ok(*line.split()))
                count = len(list(csv.reader(io.StringIO(ran.out))))
                self.assertEqual(lines.setdefault(line, count), count)
            for line in ("get --id a --json", "ls --json"):
                ran = self.ok(*line.split())
                self.assertRegex(ran.out, r"\A[ -~\n]*\Z")
                self.assertIn(run, [ran.json] + ran.json.get("data", []))

    def test_no_error_reaches_a_screen_with_control_characters(self):
        issue = {"message": EVIL, "path": [EVIL, 0, {}], "code": EVIL}
        body = {"message": "m" + EVIL, "code": EVIL, "issues": [issue, 5, {"path": 1}, {}]}
        odd = {"message": [EVIL], "code": 5, "issues": EVIL}
        endless = {"data": [], "meta": {"has_more": True, "next_cursor": EVIL}}
        upload = {"id": EVIL, "upload_url": EVIL}
        delete = ["rm", "--ids", "a"]
        initialize = ["attachments", "initialize", "--name", "x"]
        rows = [(status, body, CREATE) for status in (400, 401, 403, 404, 409, 503)]
        rows += [(200, EVIL.encode("utf-8", "replace"), ["ls"]),
                 (302, b"", ["ls"]),
                 (200, endless, ["ls"]),
                 (200, upload, CREATE),
                 (200, upload, initialize),
                 (400, odd, delete),
                 (200, {"id": [EVIL, 5, [1], {}]}, delete)]
        for status, answer, args in rows:
            self.says(ANY, answer, status, Location="http://x/\x1b[2J\x9b")
            for more in HOW_TO_TELL:
                ran = self.inside(*args, *ONCE, *more)
                self.clean(ran)
            self.assertRegex(ran.err, r"\A[ -~\n]*\Z")

    def test_no_word_of_a_command_line_reaches_a_screen_with_control_characters(self):
        odd = EVIL[:-1] + "\udcff"      # what a command line can hold
        for line in ("ls --x*", "*", "get --id *", "ls *", "ls --outcomes *", "ls --url *",
                     "ls --limit *", "ls --format *", "queue get *", "queue ls --queue q*",
                     "check --queue q*", "ls --url https://127.0.0.1:1 --ca-cert *", "ls --ids @*",
                     "create --body @*", "create --attach *", "create --metadata {*"):
            args = [word.replace("*", odd) for word in line.split()]
            if args[0] == "create":
                args = CREATE + args[1:]
            else:
                args += ONCE
            self.clean(self.inside(*args))

    def test_what_a_server_said_is_stored_and_shown_clean_from_the_queue_too(self):
        self.says("POST /v2/runs", {"message": EVIL, "issues": [{"message": EVIL}]}, 422)
        self.clean(self.ok(*CREATE, *QUEUE))
        entry, = self.ok("queue", "ls", *QUEUE, "--json").json["data"]
        self.assertEqual(entry["state"], "parked")
        for line in ("queue ls", "queue get " + entry["client_run_ref"][:8], "check",
                     "queue ls --format jsonl", "queue retry"):
            self.clean(self.inside(*line.split(), *QUEUE))

    def test_a_file_name_with_control_characters_is_sent_shown_and_saved_safely(self):
        names = ["a\x7f\x9b2J\u202e.txt"]      # Windows takes it too
        if POSIX:
            names += ["b\x1b[2J\n.txt", "c\udcff.txt"]
        for name in names:
            save(name, b"")
            made = self.clean(self.ok(*CREATE, "--attach", name))
            run_id = made.out.split()[2]
            self.clean(self.ok("get", run_id, "--download", "into"))

    def test_an_attachment_is_saved_in_its_folder_under_a_name_of_every_system(self):
        """N4: Windows takes the reserved names with blanks and any ending for devices."""
        names = ["../../up", "/etc/x", "C:\\x", "..", "", None, 5, ["/"], "NUL", EVIL, "a\0b",
                 "x" * 500, "\u00b5" * 200, ".", "a/../../b", "\ud800", "x:y", "x.", "CONIN$",
                 "conout$.txt", "NUL .x", "COM1 .txt", "lpt9", "COM\u00b9.y", "aux .", " con",
                 "a?b", 'a"<>|*b']
        for name in names:
            self.shows(self.box.url + "/storage/x", name=name)
            self.clean(self.ok(*ATTACHED))
        saved = os.listdir("into")
        reserved = r"(?i)^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d\xb9\xb2\xb3]) *(\.|$)"
        for name in saved:
            self.assertNotRegex(name, r'[/\\:*?"<>|]|[. ]$|^ |\.part$|' + RAW.pattern)
            self.assertNotRegex(name, reserved)
            self.assertLessEqual(len(os.fsencode(name)), 255)
        self.assertEqual(len(saved), len(names))
        self.assertEqual(os.listdir(self.folder), ["into"])

    def test_a_download_gets_a_name_that_the_file_system_can_write(self):
        run_id = self.made()
        self.put(run_id, WORLD + ".txt", b"x")
        env = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0")
        process = self.popen(sys.executable, "-X", "utf8=0", SCRIPT, "get", "--id", run_id,
                             "--download", "d", env=env)
        self.ended(process, 0)
        name, = os.listdir("d")
        self.assertRegex(name, r"^Zo.*\.txt$")
        if not POSIX:       # it writes every name
            self.assertEqual(name, WORLD + ".txt")

    def test_text_that_utf8_cannot_write_is_refused(self):
        for more in (("--set", "op=M\udcfcller"),
                     ("--metadata", '{"a":"\\ud800"}'),
                     ("--docstring", "\udcfc")):
            self.tells(2, "UTF-8", *CREATE, *more)
        self.assertEqual(self.sent("POST"), [])

    def test_a_name_of_100000_characters_costs_a_few_looks_at_each_of_them(self):
        """W5. Control: a truncate() that measures its text again for every character it drops."""
        long, looks = "測" * 100000, [0]
        phases = [{"name": long, "outcome": "FAIL", "measurements": [
            {"name": long, "outcome": "FAIL", "units": long, "measured_value": long}]}]
        run = dict(self.whole(), docstring=long, phases=phases)
        page = {"data": [run], "meta": {"has_more": False}}
        self.says("GET /v2/runs/{id}", run)
        self.box.fault("status", "GET /v2/runs", times=None, status=200, body=page)
        measure = runs.character_width

        def counted(character):
            looks[0] += 1
            if looks[0] > 50 * len(long):
                raise MemoryError("quadratic")
            return measure(character)
        with mock.patch.object(runs, "character_width", counted):
            for line in ("get --id a", "ls --columns docstring,id", "ls --summary", "ls"):
                for tty in (True, False):
                    self.ok(*line.split(), tty=tty)
                    self.assertLess(looks[0], 10 * len(long), line)
                    looks[0] = 0


class Secrets(SecretCase):
    """Where a key may come from and go to, and that nothing shows it."""

    def test_a_key_that_no_header_can_hold_is_refused_and_shown_nowhere(self):
        self.secrets.add("S3cr")
        for bad in (b"S3cr et-key-1", b"S3cret\nkey-1", b"S3cret-\xc3\xbc\xc3\xbc", b"S3cret", b"",
                    b"S3cret\tkey-1", b"S3cret-" + 600 * b"x"):
            path = self.file("key", bad)
            for more in HOW_TO_TELL:
                self.fails(3, "ls", *more, "--api-key-file", path)
                self.fails(3, "ls", *more, env={"TOFUPILOT_API_KEY": os.fsdecode(bad)})
        self.fails(3, "ls", "--api-key-file", path + "-missing")
        self.assertEqual(self.box.requests, [])
        key = self.box.user_key.encode()
        self.env["TOFUPILOT_API_KEY"] = "another-key"
        for around in (b"%s\r\n", b"%s\n", b" %s", b'"%s"\r\n'):
            good = around % key
            self.ok("ls", "--api-key-file", self.file("key", good))
            self.ok("ls", "--api-key-file", "-", input=good)
        self.fails(2, "ls", "--api-key-file", "-", "--ids", "-")

    def test_a_key_in_the_place_of_its_file_is_not_shown(self):
        """Control: show the path wherever it looks like one."""
        for key in ("sk-live/abc.def-12", "tp_3.f9c/..x", "plain-key-123456", self.box.user_key):
            self.secrets.add(key)
            for more in HOW_TO_TELL:
                self.fails(3, "ls", "--api-key-file", key, *more)
            ran = self.fails(3, "check", "--api-key-file", key)
            self.assertIn("not the key", ran.out + ran.err)
            self.ok(*CREATE, *QUEUE, "--api-key-file", key, "-v")

    def test_quotes_that_cmd_leaves_around_a_key_or_a_url_are_taken_off(self):
        for quotes in ('"{}"', "'{}'", ' "{}" '):
            env = {"TOFUPILOT_API_KEY": quotes.format(self.box.user_key),
                   "TOFUPILOT_URL": quotes.format(self.box.url)}
            self.ok("ls", env=env)

    def test_a_key_from_a_credentials_file_goes_where_its_owner_said_and_nowhere_else(self):
        os.mkdir(self.env["TOFUPILOT_HOME"])
        url = self.env.pop("TOFUPILOT_URL")
        key = self.env.pop("TOFUPILOT_API_KEY")
        here, mine = {"TOFUPILOT_URL": url}, {"TOFUPILOT_API_KEY": key}
        full = {"api_key": key, "base_url": url}
        there = dict(full, base_url=CLOSED)
        for status, files, env in (
                (0, [full], {}),
                (0, [full, "{"], {}),
                (0, [{}, full], {}),
                (0, [None, full], {}),
                (0, [dict(full, api_key=""), full], {}),
                (0, [{"api_key": key}], here),
                (0, [there], here),
                (0, [dict(full, api_key="x" * 9)], mine),
                (0, ["{", "["], dict(here, **mine)),
                (2, [{"api_key": key}], {}),
                (2, [dict(full, base_url="http://u:pw@127.0.0.1")], {}),
                (2, [dict(full, base_url="http://192.0.2.1")], {}),
                (2, [dict(full, base_url=5)], {}),
                (3, [], here),
                (3, [{"base_url": CLOSED}], here),
                (3, ["{"], here),
                (3, ["[1]"], here),
                (3, [dict(full, api_key=[key])], here),
                (3, ["\xff"], here),
                (3, [dict(full, api_key=5)], here),
                (6, [there], {})):
            self.write_credentials(*files)
            del self.box.requests[:]
            ran = self.fails(status, "ls", *ONCE, env=env)
            self.assertNotIn("pw@", ran.err)
            self.assertEqual("warning" in ran.err, files == ["{", "["])
            count = 1 if status == 0 else 0
            self.assertEqual(len(self.box.requests), count, files)

    def write_credentials(self, *files):
        """The credentials files of the home, of dicts or texts; None or too few: it is missing."""
        for number, name in enumerate(("credentials.json", "station.json")):
            fields = files[number] if number < len(files) else None
            path = self.at("home", name)
            if fields is None:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
                continue
            text = fields if isinstance(fields, str) else json.dumps(fields)
            self.file(os.path.join("home", name), text.encode("latin-1"))
            os.chmod(path, 0o600)

    def test_links_to_runs_have_the_organization_of_the_credentials_files_server_alone(self):
        os.mkdir(self.env["TOFUPILOT_HOME"])
        url = self.env.pop("TOFUPILOT_URL")
        key = self.env.pop("TOFUPILOT_API_KEY")
        self.write_credentials({"api_key": key, "base_url": url, "organization_slug": "acme"})
        made = self.ok(*CREATE)
        run_id = made.out.split()[2]
        for ran in (made, self.ok("get", "--id", run_id)):
            self.assertIn(f"{url}/acme/proc_abc/runs/{run_id}", ran.out)
        elsewhere = {"TOFUPILOT_URL": url.replace("127.0.0.1", "localhost")}
        self.assertNotIn("/acme", self.ok(*CREATE, env=elsewhere).out)

    @unittest.skipUnless(POSIX, "modes and owners of files are of POSIX")
    def test_a_key_file_that_others_can_read_is_warned_of(self):
        """A file of root's is none: only root could have written it.

        Control: leave the mask of the mode, or the owner, out.
        """
        key = self.box.user_key
        path = self.file("key", key.encode())
        os.mkdir(self.env["TOFUPILOT_HOME"])
        self.write_credentials({"api_key": key, "base_url": self.box.url})
        own = self.at("home", "credentials.json")
        for mode, is_open in ((0o600, False),
                              (0o400, False),
                              (0o640, True),
                              (0o604, True)):
            os.chmod(path, mode)
            os.chmod(own, mode)
            told = self.ok("ls", "--api-key-file", path).err
            self.assertEqual(f"{path} can be read by other users" in told, is_open)
            told = self.ok("ls", "--api-key-file", "key").err       # it is a file, so no key
            self.assertEqual("key can be read by other users" in told, is_open)
            told = self.ok("ls", env={"TOFUPILOT_API_KEY": ""}).err
            self.assertEqual("credentials.json can be read" in told, is_open)
        ran = self.fails(3, "check", env={"TOFUPILOT_API_KEY": ""})
        self.assertRegex(ran.out, "FAIL  key .*can be read by other users")
        with mock.patch.object(os, "getuid", lambda: 1000):
            for owner, mode, is_open in ((1000, 0o600, False),
                                         (0, 0o600, False),
                                         (1001, 0o600, True),
                                         (0, 0o644, True)):
                state = SimpleNamespace(st_uid=owner, st_mode=stat.S_IFREG | mode)
                self.assertEqual(runs.is_open_to_others(state), is_open, (owner, mode))

    def test_an_address_that_is_no_https_origin_or_this_machine_is_refused_unasked(self):
        asked = []

        def refuse(host, port, *_, **__):
            asked.append((host, port))
            raise socket.gaierror(-2, "unknown")
        with mock.patch.object(socket, "getaddrinfo", refuse):
            for url in (
                    "http://192.0.2.1", "http://localhost.example.com", "http://127.0.0.1.nip.io",
                    "http://localhost@192.0.2.1", "http://2130706433", "ftp://127.0.0.1", "//a",
                    "file:///etc/passwd", "https://user:pw@127.0.0.1", "https://127.0.0.1/x",
                    "https://a b", "https://127.0.0.1\n/", "https://", "127.0.0.1", "https://a?b",
                    "https://a#b", "https://a:99999", "https://a:0", "https://a:b", "https://[::1",
                    "https://a\\@b", "https://\u00e9", "https://a/api/v2", "http://0.0.0.0",
                    "http://127.0.0.1.", "http://[::ffff:192.0.2.1]"):
                for args, env in ((("--url", url), {}),
                                  ((), {"TOFUPILOT_URL": url})):
                    self.assertNotIn("pw", self.fails(2, "ls", *args, env=env).err)
            self.assertEqual(asked, [])
            self.fails(6, "ls", "--url", "http://192.0.2.1", "--allow-http", *ONCE)
        self.assertEqual(asked, [("192.0.2.1", 80)])
        for url in ("http://localhost:1", "http://127.0.0.1", "http://[::1]:81", "https://a:1"):
            for end in ("", "/", "/api", "/api/"):
                self.assertEqual(runs.parse_origin(url + end), url)

    def test_check_says_what_is_wrong_and_never_the_key(self):
        foreign = self.file("q", b"no queue")
        now = self.box.store.clock
        for status, name, env, args in (
                (0, "", {}, []),
                (3, "key", {"TOFUPILOT_API_KEY": ""}, []),
                (6, "queue", {}, ["--queue", foreign]),
                (2, "clock", {}, []),
                (6, "identity", {"TOFUPILOT_URL": CLOSED}, ONCE),
                (3, "identity", {"TOFUPILOT_API_KEY": "wrong-key-1"}, [])):
            back = 86400 if name == "clock" else 0
            self.box.store.clock = lambda: now() - back
            ran = self.fails(status, "check", *args, env=env)
            as_json = self.fails(status, "check", "--json", *args, env=env).json
            failed = [row["name"] for row in as_json["data"] if not row["ok"]]
            self.assertEqual(failed[:1], [name] if name else [])
            hints = re.findall("(?m)^FAIL .*\n +Fix: ", ran.out)
            self.assertEqual(len(hints), len(failed))
            self.assertRegex(ran.out, "sha256 +[0-9a-f]{64}\n")
        self.assertEqual(content(foreign), b"no queue")

    def test_no_failure_shows_or_leaves_behind_a_key_or_a_signature(self):
        path = self.file("a.txt")
        echo = {"message": "what is Authorization: Bearer " + self.box.user_key}
        upload = {"id": "a", "upload_url": CLOSED + "/x?signature=abc"}
        rows = [("status", ANY, {"status": status}) for status in (401, 403, 404, 429, 500)]
        rows += [(kind, ANY, {}) for kind in ("drop-before", "reset", "portal", "redirect")]
        for kind in ("drop-after", "status", "redirect"):
            rows += [(kind, match, {}) for match in ("PUT .*", "POST .*/finalize", "PATCH .*")]
        rows += [
            ("raw", "PUT .*", {"data": b"x"}),
            ("status", ANY, {"status": 400, "body": echo}),
            ("status", "PUT .*", {"status": 403, "body": echo}),
            ("status", "POST /v2/attachments", {"status": 200, "body": upload})]
        for number, (kind, match, options) in enumerate(rows):
            self.box.calm()
            self.box.fault(kind, match, times=None, **options)
            new = CREATE + ["--docstring", str(number), "--attach", path]
            self.assertNotEqual(self.inside(*new, *ONCE, "-v").status, 0)
            self.inside(*new, *QUEUE, "-v")
            self.inside("queue", "retry", *QUEUE, "-v")
            self.inside("check", *QUEUE, *ONCE, "-v")
        self.inside("queue", "ls", *QUEUE)
        self.assertIn(b"what is Authorization", content("q"))


class SecretsSaidBack(SecretCase):
    """A server that says the key back, in whatever place and form, is not repeated."""

    # A line for each command: what it asks for, and what it is called.
    COMMANDS = (("GET /v2/runs", ["ls"]),
                ("GET /v2/runs/{id}", ["get", "--id", "a"]),
                ("POST /v2/runs", CREATE),
                ("DELETE /v2/runs", ["rm", "--ids", "a"]),
                ("PATCH .*", ["update-metadata", "--id", "a", "--set", "a=1"]),
                ("PATCH .*", ["update", "--id", "a", "--attachments", "b"]),
                ("POST .*", ["create-attachment", "--id", "a", "--name", "x"]),
                ("POST .*", ["attachments", "initialize", "--name", "x"]),
                ("POST .*", ["attachments", "finalize", "--id", "x"]),
                ("GET /v2/whoami", ["check"]))

    STATUSES = ("200 OK", "401 No", "404 No", "422 No", "503 Busy")

    def said_back(self, key, statuses=STATUSES):
        """The bytes of answers that hold the key, one for each place."""
        for status in statuses:
            for body in self.bodies(key):
                yield raw_answer(body, status=status)
        for line in ("Content-Type: {}", "Content-Type: text/{}", "Content-Encoding: {}",
                     "Content-Length: {}", "Transfer-Encoding: {}", "Retry-After: {}", "Date: {}",
                     "{}: {}", "{}"):
            for status in statuses[:2]:
                yield raw_answer(EMPTY, line.replace("{}", key), status=status)
        for pad in range(0, 200, 19):        # what is cut short is masked first
            start = "x" * pad + key
            yield start.encode() + b"\r\n\r\n"
            yield raw_answer(b"", status="400 " + start)
            yield raw_answer(b"", f"Location: https://x.example/{start}?{key}", status="302 Found")
        yield raw_answer(key.encode() + b"\r\n", "Transfer-Encoding: chunked")

    def bodies(self, key):
        """The bodies of answers that hold the key, in each field and encoding."""
        bearer = "Bearer " + key
        codes = [f"\\u{ord(character):04x}" for character in key]
        escaped = "".join(codes)
        padded = "x" * (503 - len(key)) + key
        issue = {"path": [key], "message": bearer}
        everything = {"id": key, "upload_url": key, "url": key, "data": key}
        texts = ['{"message": "%s", "code": "%s"}' % (escaped, escaped), bearer * 9,
                 "<html>" + bearer]
        for document in ({"message": bearer}, {"error": bearer}, {"error_description": key},
                         {"message": padded}, {"message": "m", "code": key},
                         {"message": "m", "issues": [issue]}, everything):
            texts.append(json.dumps(document))
        for text in texts:
            yield text.encode()
        for encoding in ("utf-16", "utf-16-le", "utf-32"):
            yield texts[0].encode(encoding)
            yield texts[-1].encode(encoding)

    def test_no_command_shows_a_key_that_a_server_says_back_anywhere(self):
        """Control: leave any form out of Transport.mask or mask_body."""
        for number, data in enumerate(self.said_back(self.box.user_key)):
            for match, args in self.COMMANDS[number % 3::3]:
                self.box.calm()
                self.box.fault("raw", match, times=None, data=data)
                self.inside(*args, *ONCE, "-v" if number % 2 else "--json")

    def test_no_queue_holds_a_key_that_a_server_says_back(self):
        for number, data in enumerate(self.said_back(self.box.user_key, ["422 No"])):
            self.box.calm()
            self.box.fault("raw", "POST .*", times=None, data=data)
            self.inside(*create(f"SN-{number}"), *QUEUE, "-v", "--timeout", "5")
        self.ok("queue", "ls", *QUEUE)
        self.ok("queue", "ls", *QUEUE, "--json")
        self.inside("check", *QUEUE)

    def test_a_key_with_odd_characters_is_masked_in_each_spelling(self):
        """Control: hide() without the JSON or the percent-encoded form."""
        for key in ('we"ird\\key-1', "slash/es/12", "per%63ent-1", "plus+plus=="):
            self.secrets.add(key)
            env = {"TOFUPILOT_API_KEY": key}
            forms = [key, quote(key, safe=""), json.dumps(key)]
            forms.append(key.replace("/", "\\/"))
            for form in forms:
                form = form.encode()
                message = b'{"message": "%s"}' % form
                for data in (raw_answer(message, status="400 x"), raw_answer(form),
                             form + b"\r\n\r\n"):
                    self.box.calm()
                    self.box.fault("raw", ANY, times=None, data=data)
                    self.inside("ls", *ONCE, "-v", env=env)
                self.inside(*CREATE, *QUEUE, "-v", env=env)

    def test_a_storage_that_says_the_key_back_is_not_repeated(self):
        path = self.file("a.txt")
        for number, data in enumerate(self.said_back(self.box.user_key, ("200 OK", "403 No"))):
            self.shows(self.box.url + "/storage/y")
            self.box.fault("raw", "GET /storage/.*", times=None, data=data)
            self.box.fault("raw", "PUT /storage/.*", times=None, data=data)
            self.inside(*ATTACHED, *ONCE, "-v")
            shutil.rmtree("into", ignore_errors=True)       # a file is saved as it comes
            if number % 4 == 0:
                self.inside(*create(f"SN-{number}"), "--attach", path, *ONCE, "-v")

    def test_a_field_of_a_run_that_holds_the_key_is_masked_too(self):
        run = dict(self.whole(), docstring="Bearer " + self.box.user_key)
        self.says("GET /v2/runs/{id}", run)
        for more in ((),
                     ("--json",),
                     ("--format", "csv"),
                     ("--columns", "docstring")):
            self.ok("get", "--id", "a", *more)
        self.ok("get", "--id", "a", "--out", "o")
        self.assertIn(b"(the key)", content("o"))

    def test_a_search_for_the_key_is_not_logged(self):
        self.ok("ls", "--search-query", self.box.user_key, "-v")


class ProxyCase(SecretCase):
    """A machine with a proxy; the API is at a host that only the proxy reaches."""
    scheme = "http"

    def setUp(self):
        super().setUp()
        self.peer = Proxy(self, self.box.host)
        self.here = self.box.url
        self.box.store.origin = f"{self.scheme}://{OTHER_HOST}"
        self.env["TOFUPILOT_URL"] = self.box.store.origin

    def way(self, address):
        """The environment variables that name a proxy."""
        return {"http_proxy": address, "HTTPS_PROXY": address}


class Proxies(ProxyCase):
    """What goes through a proxy, and that its password is nowhere shown. TLS never begins here."""

    def setUp(self):
        super().setUp()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)   # without the system's certificates
        patched = mock.patch.object(runs.Transport, "make_context", lambda transport: context)
        patched.start()
        self.addCleanup(patched.stop)

    def test_a_proxy_for_both_schemes_is_taken_for_both(self):
        """Control: keep an opener for each proxy; it knows one scheme alone."""
        address = "http://" + self.peer.host
        transport = runs.Transport()
        with mock.patch.dict(os.environ, {"http_proxy": address, "https_proxy": address}):
            for scheme in ("https", "http"):
                opener = transport.opener_for(urlsplit(f"{scheme}://other.example/"))
                proxies = {}
                for handler in opener.handlers:
                    proxies.update(getattr(handler, "proxies", {}))
                self.assertEqual(proxies, {scheme: address})

    def test_nothing_for_this_machine_goes_to_a_proxy(self):
        """Control: without is_this_machine in proxy_for the proxy reads the key."""
        self.env.update(self.way("http://" + self.peer.host))
        for host in ("127.0.0.1", "localhost", "LOCALHOST"):
            self.ok("ls", "--url", self.here.replace("127.0.0.1", host))
        for url in ("https://127.0.0.1:1", "https://localhost:1", "http://[::1]:1",
                    "http://127.9.9.9:1"):
            self.fails(6, "ls", "--url", url, *ONCE)
        self.env["TOFUPILOT_URL"] = self.box.store.origin = self.here
        ran = self.ok("check")
        self.assertIn("proxy     none", ran.out)
        ran = self.ok(*CREATE, "--attach", self.file("a.txt"), "--json")
        self.ok("get", ran.json["id"], "--download", "into")
        self.assertEqual(self.peer.heads, [])

    def test_plain_http_through_a_proxy_needs_allow_http(self):
        """A proxy is another machine: it reads what it passes on."""
        self.env.update(self.way("http://" + self.peer.host))
        for args in (["ls"], CREATE, ["check"]):
            ran = self.fails(2, *args)
            self.assertIn("plain http", ran.out + ran.err)
        self.assertEqual(self.peer.heads, [])
        self.ok("ls", "--allow-http")
        self.assertEqual(self.peer.methods(), ["GET"])
        path = self.file("a.txt")
        self.ok(*CREATE, "--attach", path, "--allow-http")
        self.assertIn("PUT", [request.method for request in self.box.requests])
        self.assertEqual(self.box.connections, len(self.peer.heads))

    def test_no_proxy_takes_a_host_out(self):
        def stay_here(host, port, *args, **more):
            return ADDRESSES("127.0.0.1", self.box.server_address[1], *args, **more)
        with mock.patch.object(socket, "getaddrinfo", stay_here):
            for address in ("http://" + self.peer.host, "socks5://127.0.0.1:1"):
                way = dict(self.way(address), NO_PROXY=OTHER_HOST)
                self.ok("ls", "--allow-http", env=way)
        self.assertEqual(self.peer.heads, [])

    def test_a_socks_proxy_is_refused_by_name(self):
        """Control: http.client would speak HTTP to it: 'Remote end closed connection'."""
        for name in ("socks5", "socks5h", "socks4", "SOCKS5"):
            for url in ("https://api.example", "http://api.example"):
                address = f"{name}://user:{PASSWORD}@127.0.0.1:1080"
                ran = self.fails(6, "ls", "--url", url, "--allow-http", env=self.way(address))
                self.assertIn(f"{name}://127.0.0.1:1080 is a SOCKS proxy", ran.err)
                self.assertRegex(ran.err, "HTTPS?_PROXY")
                self.assertNotIn("next try", ran.err)
                ran = self.fails(6, "check", "--url", url, "--allow-http", env=self.way(address))
                self.assertIn("FAIL  proxy", ran.out)
        queued = self.ok(*CREATE, *QUEUE, "--allow-http", env=self.way(address))
        self.assertIn("is a SOCKS proxy", queued.out)

    def logins(self, host):
        """(a proxy's address, its password) in each spelling that people use."""
        for login, password in (
                (f"user:{PASSWORD}", PASSWORD),
                (f"user:{PASSWORD}%21", PASSWORD + "!"),
                ("user:s3%63ret", PASSWORD),
                ("user:p@s3cret", "p@s3cret"),
                ("user:p:s3cret", "p:s3cret"),
                ("us%40er:s3cret", PASSWORD),
                ("user:s3cret%2Fx", "s3cret/x"),
                ("user:s3cret%40x", "s3cret@x"),
                ("user:s3cret#x", "s3cret#x"),
                ("user:s3cret?x", "s3cret?x"),
                ("user:s3cret/x", "s3cret/x"),
                ("user:x/s3cret", "x/s3cret")):
            yield f"http://{login}@{host}", password
        yield f"user:{PASSWORD}@{host}", PASSWORD
        yield f"user:p@{PASSWORD}@{host}", f"p@{PASSWORD}"
        yield f"HTTP://user:{PASSWORD}@{host}", PASSWORD

    def test_a_proxys_password_is_shown_nowhere_in_whatever_spelling(self):
        """Control: leave a form out of proxy_for, or `rpartition("@")` in without_login."""
        for address, _ in self.logins("127.0.0.1:1"):
            way = self.way(address)
            for url in ("https://api.example", "http://api.example"):
                for args in (["ls", "-v"],
                             ["check", "--json"]):
                    self.inside(*args, *ONCE, "--url", url, "--allow-http", env=way)
            self.inside(*CREATE, *QUEUE, "-v", "--url", url, "--allow-http", env=way)
            shown = runs.without_login(address)
            self.assertTrue(shown.endswith("127.0.0.1:1"), shown)
            self.assertNotIn("s3", shown)

    def test_a_proxy_that_says_its_password_back_is_not_repeated(self):
        for address, password in self.logins("{}"):
            login = address.rpartition("@")[0].rpartition("//")[2]
            code = base64.b64encode(unquote(login).encode())
            forms = [login.encode(), password.encode(), code, quote(password).encode()]
            for status in ("407 Login", "403 No", "200 OK"):
                self.refuse(address, status, b", ".join(forms))

    def refuse(self, address, status, text):
        """Commands through a proxy that answers itself, and repeats a text everywhere."""
        body = json.dumps({"message": text.decode()}).encode()
        answer = raw_answer(body, "X: y", status=f"{status} {text.decode()}")
        del self.peer.heads[:]
        self.peer.reply = lambda head: answer
        way = self.way(address.replace("{}", self.peer.host))
        args = ("ls", "--allow-http", "--timeout", "2", *ONCE)
        self.inside(*args, "--url", "https://api.example", "-v", env=way)
        self.inside(*args, "--url", "http://api.example", "--json", env=way)

    def test_a_proxy_that_refuses_is_told_as_such(self):
        self.peer.reply = lambda head: raw_answer(b"", status="407 Login please")
        way = self.way("http://" + self.peer.host)
        ran = self.fails(6, "ls", "--url", "https://api.example", *ONCE, env=way)
        self.assertIn("407 Login please", ran.err)
        self.assertIn("proxy: http://" + self.peer.host, ran.err)
        self.assertNotIn("ssl", ran.err)


# One key; a CA of the old form that Python 3.13 refuses unless its strict flag is off; certificates
# that it signed, and one that signed itself. openssl made them; they are valid from 2020 to 2120,
# `old` until 2021. `good` and `self` are for 127.0.0.1 and api.example, `other` for example.com.
CERTIFICATES = {
    "key": """
        MHcCAQEEIEauWl3BybfsItf8fUIi1IhxmgBcWbK9XInaECqPw3LioAoGCCqGSM49AwEHoUQDQgAERv2qxw1gs
        cyGnF1Dqw+vMzffHx4MK9FSHnO1feiKKjgSjxn8lM09uVXEtHmhQ7MVVCuhFI3vnNflHRJbdhfijQ==""",
    "ca": """
        MIIBRzCB7aADAgECAgEHMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB0ZhY3RvcnkwIBcNMjAwMTAxMDAwMDAwW
        hgPMjEyMDAxMDEwMDAwMDBaMBIxEDAOBgNVBAMMB0ZhY3RvcnkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAA
        RG/arHDWCxzIacXUOrD68zN98fHgwr0VIec7V96IoqOBKPGfyUzT25VcS0eaFDsxVUK6EUje+c1+UdElt2F+K
        NozIwMDAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBTFErcoK4CMOKnCLnkovN6T/q6/KDAKBggqhkjOPQQD
        AgNJADBGAiEAriSKREc4c1QhV/J3J5oRZ+E+5xQzwPJLNtSuShBjjc4CIQDnV+vXNb9/OBhFTXzQdJ648GOlF
        1ohOc/x6vzuCXIaNg==""",
    "good": """
        MIIBUTCB96ADAgECAgEJMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB0ZhY3RvcnkwIBcNMjAwMTAxMDAwMDAwW
        hgPMjEyMDAxMDEwMDAwMDBaMA8xDTALBgNVBAMMBGxlYWYwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARG/a
        rHDWCxzIacXUOrD68zN98fHgwr0VIec7V96IoqOBKPGfyUzT25VcS0eaFDsxVUK6EUje+c1+UdElt2F+KNoz8
        wPTAcBgNVHREEFTAThwR/AAABggthcGkuZXhhbXBsZTAdBgNVHQ4EFgQUxRK3KCuAjDipwi55KLzek/6uvygw
        CgYIKoZIzj0EAwIDSQAwRgIhAIbC7C1nHIr4Ny+KE9gwWjnpsN7S/9RSHepnax3DAg0/AiEA0DBV8RjOvPNt0
        e/cwLgEU7NFCPLQmQkqcIh7tLV7eaw=""",
    "other": """
        MIIBSTCB8aADAgECAgEKMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB0ZhY3RvcnkwIBcNMjAwMTAxMDAwMDAwW
        hgPMjEyMDAxMDEwMDAwMDBaMA8xDTALBgNVBAMMBGxlYWYwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARG/a
        rHDWCxzIacXUOrD68zN98fHgwr0VIec7V96IoqOBKPGfyUzT25VcS0eaFDsxVUK6EUje+c1+UdElt2F+KNozk
        wNzAWBgNVHREEDzANggtleGFtcGxlLmNvbTAdBgNVHQ4EFgQUxRK3KCuAjDipwi55KLzek/6uvygwCgYIKoZI
        zj0EAwIDRwAwRAIgb5Fl9yjAst8cjtBuxVEWlZjJdHRffdSL0QBhYVjfoxECIF9rk349yaAfbndRfOmzwC3Mt
        vQ666NVv9JIEmAuYOFb""",
    "old": """
        MIIBTTCB9aADAgECAgELMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB0ZhY3RvcnkwHhcNMjAwMTAxMDAwMDAwW
        hcNMjEwMTAxMDAwMDAwWjAPMQ0wCwYDVQQDDARsZWFmMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAERv2qxw
        1gscyGnF1Dqw+vMzffHx4MK9FSHnO1feiKKjgSjxn8lM09uVXEtHmhQ7MVVCuhFI3vnNflHRJbdhfijaM/MD0
        wHAYDVR0RBBUwE4cEfwAAAYILYXBpLmV4YW1wbGUwHQYDVR0OBBYEFMUStygrgIw4qcIueSi83pP+rr8oMAoG
        CCqGSM49BAMCA0cAMEQCIAKNX+BlThOktSrbmdkq3em7Dh8/h7u6ql75ixhWeG1+AiA3gdbWakzUFEkziv1IQ
        s8idblOQk1cFmMUy5BzRCuPwQ==""",
    "self": """
        MIIBUzCB+qADAgECAgEIMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB0ZhY3RvcnkwIBcNMjAwMTAxMDAwMDAwW
        hgPMjEyMDAxMDEwMDAwMDBaMBIxEDAOBgNVBAMMB0ZhY3RvcnkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAA
        RG/arHDWCxzIacXUOrD68zN98fHgwr0VIec7V96IoqOBKPGfyUzT25VcS0eaFDsxVUK6EUje+c1+UdElt2F+K
        Noz8wPTAcBgNVHREEFTAThwR/AAABggthcGkuZXhhbXBsZTAdBgNVHQ4EFgQUxRK3KCuAjDipwi55KLzek/6u
        vygwCgYIKoZIzj0EAwIDSAAwRQIhAM7rLFXP4eOOk4qmc4ikZqks2RmQaOBSK7YVQda4o6zZAiBjX/V6ih4pt
        L3lWiS0haeEl6p9583nhLDJX1yJEDzzsw==""",
}


def write_certificates(folder):
    """A PEM file for each of CERTIFICATES, with its name."""
    for name, text in CERTIFICATES.items():
        label = "EC PRIVATE KEY" if name == "key" else "CERTIFICATE"
        lines = re.findall(".{1,64}", "".join(text.split()))
        pem = [f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]
        save(os.path.join(folder, name), "\n".join(pem).encode())


class Tls(ProxyCase):
    """Certificates, private CAs, and a tunnel through a proxy."""
    scheme = "https"

    @classmethod
    def setUpClass(cls):
        cls.made = tempfile.mkdtemp(prefix="tofupilot-test-")
        write_certificates(cls.made)
        cls.ca = os.path.join(cls.made, "ca")
        cls.options = {"tls": cls.server("good")}

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.made)

    @classmethod
    def server(cls, name):
        """The context of a server with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate = os.path.join(cls.made, name)
        key = os.path.join(cls.made, "key")
        context.load_cert_chain(certificate, key)
        return context

    def setUp(self):
        super().setUp()
        self.box.store.origin = self.env["TOFUPILOT_URL"] = self.here
        self.trust = ("--ca-cert", self.ca)

    def test_a_private_ca_counts_where_it_is_given(self):
        """The CA is of the old form that 3.13 refuses, unless its strict flag is off."""
        keys = self.at("keys")
        self.ok("ls", *self.trust, env={"SSLKEYLOGFILE": keys})
        self.assertFalse(os.path.exists(keys))      # ssl alone writes it
        self.ok("ls", env={"TOFUPILOT_CA_CERT": self.ca})
        ran = self.fails(6, "ls")
        self.assertRegex(ran.err, "(?s)127.0.0.1.*cannot be verified.*--ca-cert.*clock")
        self.assertNotIn("next try", ran.err)
        is_strict = sys.version_info >= (3, 13)
        status = 6 if is_strict else 0
        self.fails(status, "ls", *ONCE, env={"SSL_CERT_FILE": self.ca})

    def test_the_ca_of_a_credentials_file_counts_too(self):
        """W17: `tofupilot login` at a self-hosted server writes it there."""
        os.mkdir(self.env["TOFUPILOT_HOME"])
        fields = {"api_key": self.box.user_key, "base_url": self.here, "ca_cert": self.ca}
        path = os.path.join("home", "credentials.json")
        self.file(path, json.dumps(fields).encode())
        os.chmod(path, 0o600)
        self.ok("ls", env={"TOFUPILOT_API_KEY": "", "TOFUPILOT_URL": ""})
        self.assertIn("ca        " + self.ca, self.ok("check").out)

    def test_every_other_certificate_is_refused(self):
        other_name = self.here.replace("127.0.0.1", "localhost")
        self.fails(6, "ls", *self.trust, "--url", other_name)
        for name, told in (("other", "name the server in --url"),
                           ("old", "expired"),
                           ("self", "--ca-cert")):
            box = self.another(tls=self.server(name))
            ran = self.fails(6, "ls", *self.trust, "--url", box.url)
            if sys.version_info >= (3, 7):      # 3.6 gives no reason
                self.assertIn(told, ran.err)
            self.assertEqual(box.requests, [])

    def test_a_ca_file_that_is_none_is_bad_input(self):
        for path in (self.file("garbage", b"x"), self.folder, self.at("missing"),
                     self.file("empty", b"")):
            self.tells(2, "CA file", "ls", "--ca-cert", path)
            self.assertIn("FAIL  ca", self.inside("check", "--ca-cert", path).out)

    def test_files_obey_the_ca_and_the_rule_for_plain_http_too(self):
        self.env["TOFUPILOT_CA_CERT"] = self.ca
        path = self.file("a.txt")
        made = self.ok(*CREATE, "--attach", path, "--json").json["id"]
        self.ok("get", "--id", made, "--download", "into")
        other = self.another(tls=self.server("self"))
        self.shows(other.url + "/storage/x")
        self.fails(6, *ATTACHED, *ONCE)
        self.shows("http://storage.example/x")
        self.tells(6, "plain http", *ATTACHED, *ONCE)
        self.assertEqual(other.requests, [])
        self.assertEqual(content("into"), {"a.txt": b"content\n"})

    def test_a_tunnel_has_the_proxys_password_in_its_head_and_the_key_inside(self):
        """Control: Proxy-Authorization left among the headers of the request in the tunnel."""
        self.box.store.origin = self.env["TOFUPILOT_URL"] = "https://" + OTHER_HOST
        self.env["TOFUPILOT_CA_CERT"] = self.ca
        way = self.way(f"http://user:{PASSWORD}@{self.peer.host}")
        path = self.file("a.txt")
        self.ok(*CREATE, "--attach", path, "-v", env=way)
        self.ok("check", env=way)
        self.assertEqual(self.peer.methods(), ["CONNECT", "CONNECT"])   # one for each command
        for head in self.peer.heads:
            self.assertIn("Basic " + base64.b64encode(b"user:s3cret").decode(), head)
            self.assertNotIn(self.box.user_key, head)
        for request in self.box.requests:
            self.assertNotIn("proxy-authorization", request.headers)


def plant_link(target, path):
    """A symbolic link; on Windows, where that takes rights, a hard one."""
    if POSIX:
        os.symlink(target, path)
    else:
        os.link(target, path)


class Disks(SecretCase):
    """Disks that are full, files that are not what they seem, links that somebody planted."""

    def test_a_disk_that_fills_is_no_failure_of_the_network(self):
        """Control: without write_block it is tried again and ends with 6."""
        run_id = self.made()
        self.put(run_id, "a.txt", bytes(300000))

        def small_disk(*args):
            file = open(*args)
            write = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
            full = mock.MagicMock(write=write)
            full.name = "a.part"
            full.__enter__.return_value = full
            full.__exit__.side_effect = lambda *_: file.close()
            return full
        with mock.patch.object(runs, "open", small_disk, create=True):
            ran = self.fails(1, "get", "--id", run_id, "--download", "d")
        self.assertRegex(ran.err, "cannot write a.*No space")
        self.assertEqual(os.listdir("d"), [])
        paths = [path for _, path, _, _ in self.sent("GET")]
        self.assertEqual(paths.count("/storage"), 1)

    def test_a_full_stdout_is_told_with_exit_1_and_the_run_that_is_stored(self):
        with unwritable() as full:
            ran = self.run_script(*CREATE, "--json", stdout=full, status=1)
            self.assertEqual([ran.error["id"]], self.stored())
            for args in (["ls", "--all"],
                         ["get", *self.stored()],
                         ["check"],
                         ["--help"],
                         ["--version"],
                         ["queue", "--help"],
                         ["ls", "--dry-run"]):
                ran = self.run_script(*args, stdout=full, status=1)
                self.assertIn("cannot write", ran.err)

    def test_a_full_disk_under_a_workbook_is_told_without_a_traceback(self):
        """Control: Workbook.__exit__ that leaves archive.fp where its own writing fails."""
        self.made()
        with unwritable() as full:
            ran = self.run_script("ls", "--format", "xlsx", stdout=full, status=1)
        self.assertRegex(ran.err, "^error: cannot write")
        if POSIX and os.path.exists("/dev/full"):
            ran = self.run_script("ls", "--format", "xlsx", "--out", "/dev/full", status=1)
            self.assertRegex(ran.err, "^error: cannot write")

    def test_a_folder_that_is_not_there_is_told_before_anything_is_sent(self):
        """Control: without refuse_target the run is created, and then it ends with 1."""
        self.file("a", b"no folder")
        for folder in ("no", os.path.join("no", "such"), "a"):
            ran = self.fails(2, *CREATE, "--out", os.path.join(folder, "x.csv"))
            self.assertIn("there is no folder " + runs.printable(self.at(folder)), ran.err)
        self.assertEqual(self.sent(), [])
        self.ok("ls", "--out", os.devnull)

    def test_a_full_stderr_changes_no_result(self):
        self.made()
        self.made(serial_number="SN-2")
        with unwritable() as full:
            ran = self.run_script("ls", "--limit", "1", "-q", "-v", stderr=full, status=0)
            self.assertEqual(len(ran.out.split()), 1)
            self.run_script("get", "--id", NOBODY, stderr=full, status=4)
            self.run_script("ls", "--x", stderr=full, status=2)
            self.run_script(*CREATE, "--started-at", "2999-01-01T00:00:00Z", "--ended-at",
                            "2999-01-01T00:00:01Z", "--offline", stderr=full, status=0)

    def test_a_link_that_somebody_planted_beside_the_output_is_not_followed(self):
        """Control: a name that can be guessed, without O_EXCL, overwrites the victim."""
        self.made()
        victim = self.file("victim", b"precious")
        self.shows(self.box.url + "/storage/x")
        os.mkdir("into")
        for guessed in (bytes(8), b"\xff" * 8):
            for name in ("r.csv", "into/a.txt"):
                plant_link(victim, f"{name}.{guessed.hex()}.part")
            with mock.patch.object(os, "urandom", lambda count: guessed[:count]):
                self.tells(1, "cannot write", "ls", "--out", "r.csv")
                self.tells(1, "cannot write", *ATTACHED)
        self.assertEqual(content(victim), b"precious")
        self.ok("ls", "--out", "r.csv")
        self.ok(*ATTACHED)
        self.assertEqual(content("into/a.txt"), b"data")
        self.assertEqual(content(victim), b"precious")

    def test_a_link_that_somebody_planted_in_the_place_of_a_download_is_not_followed(self):
        victim = self.file("victim", b"precious")
        os.mkdir("into")
        plant_link(victim, "into/a.txt")
        if POSIX:
            os.symlink(self.at("nowhere"), "into/a-2.txt")
        else:
            os.mkdir("into/a-2.txt")
        self.shows(self.box.url + "/storage/x")
        self.ok(*ATTACHED)
        self.assertEqual(content("into/a-3.txt"), b"data")
        self.assertEqual(content(victim), b"precious")
        self.assertFalse(os.path.exists("nowhere"))

    def test_output_onto_the_queue_is_refused_by_whatever_name(self):
        """L25. Control: without the comparison of files in main the queue is gone, exit 0."""
        self.ok(*CREATE, "--offline", *QUEUE)
        ref = self.ok("queue", "ls", *QUEUE, "-q").out.strip()
        names = ["q", self.at("q"), os.path.join(".", "q")]
        if POSIX:
            os.symlink("q", "link")
            names.append("link")
        before = content("q")
        commands = (["queue", "ls"],
                    ["queue", "get", ref],
                    ["queue", "send"],
                    ["check"],
                    [*CREATE, "--offline"],
                    ["queue", "move", "stick"])
        for name in names:
            for args in commands:
                self.tells(2, "queue itself", *args, *QUEUE, "--out", name)
            for args in commands + (["ls"], ["get", NOBODY]):
                self.fails(2, *args, "--out", name, env={"TOFUPILOT_QUEUE": self.at("q")})
        self.assertEqual(content("q"), before)
        self.assertEqual(self.sent(), [])

    def test_output_onto_a_queue_that_the_command_makes_is_refused_too(self):
        """The file was not there when the command began."""
        for args in ([*CREATE, "--offline", "--queue", "new"],
                     [*CREATE, "--queue", "new"]):
            self.fails(2, *args, "--out", "new")
            self.assertEqual(content("new"), None)
        self.fails(2, *CREATE, "--offline", "--out", self.at("home", "runs.queue"))
        self.ok(*CREATE, "--offline", *QUEUE)
        for target in ("stick", os.path.join(".", "stick")):
            self.fails(2, "queue", "move", "stick", *QUEUE, "--out", target)
        meta = self.ok("queue", "ls", *QUEUE, "--json").json["meta"]
        self.assertEqual(meta["waiting"], 1)

    def test_output_never_destroys_the_journal_or_the_lock_of_the_queue(self):
        """A journal that is replaced cannot bring the queue back after a kill."""
        self.ok(*CREATE, "--offline", *QUEUE)
        for name in ("q-journal", "q.lock"):
            self.fails(2, "queue", "ls", *QUEUE, "--out", name)

    def test_a_command_that_fails_leaves_the_old_output(self):
        old = self.file("out.csv", b"old")
        for args, status in ((["ls", "--url", CLOSED, *ONCE], 6),
                             (["get", NOBODY], 4),
                             (["ls", "--x"], 2),
                             (["queue", "ls", *QUEUE], 4)):
            self.fails(status, *args, "--out", old)
            self.assertEqual(content(old), b"old")
        self.box.store.fill(3)
        self.box.fault("drop-before", "GET /v2/runs", skip=1, times=None)
        self.fails(6, "ls", "--all", "--page-size", "1", "--out", old, *ONCE)
        self.assertEqual(content(old), b"old")
        self.assertEqual(os.listdir(self.folder), ["out.csv"])

    def test_only_a_regular_file_is_attached_also_behind_a_link(self):
        plant_link(self.file("a.txt", b"behind"), "link")
        paths = ["missing", "a.txt/x", os.devnull, ".", ""]
        if POSIX:
            os.mkfifo("fifo")
            os.symlink("fifo", "bad")
            paths += ["fifo", "bad", "/dev/zero"]
        if os.path.exists("/proc/cpuinfo"):
            paths.append("/proc/cpuinfo")
        for number, path in enumerate(paths):
            self.tells(2, path, *CREATE, "--attach", path)
            self.tells(2, path, "create-attachment", "--id", "a", "--file",
                                           path)
        self.assertEqual(self.sent(), [])
        for number, path in enumerate(paths):
            args = create(f"SN-{number}", *QUEUE, "--attach", path)
            self.tells(5, "was left out", *args, "--offline")
        self.ok("queue", "send", *QUEUE, "-q")
        self.assertEqual(len(self.stored()), len(paths))
        made = self.ok(*CREATE, "--attach", "link", "--json").json["id"]
        self.ok("get", "--id", made, "--download", "into")
        self.assertEqual(content("into/link"), b"behind")

    def test_a_file_that_changes_while_its_run_is_sent(self):
        """A log that grows goes up as it was; one that is cut or gone is told: exit 6, the ID."""
        path = self.at("a.log")
        whole = b"x" * 100000

        def grow():
            with open(path, "ab") as file:
                file.write(b"more")
        for number, (change_it, status, sent) in enumerate((
                (grow, 0, whole),
                (lambda: os.truncate(path, 1000), 6, None),
                (lambda: os.truncate(path, 0), 6, None),
                (lambda: os.remove(path), 6, None),
                (lambda: os.utime(path, (1, 1)), 0, whole))):
            self.file("a.log", whole)
            self.change_at_upload(change_it)
            ran = self.fails(status, *create(f"SN-{number}"), "--attach", path, "--json")
            self.box.on_request = None
            run_id = (ran.json if status == 0 else ran.error)["id"]
            self.assertEqual(run_id, self.stored()[-1])
            self.ok("get", run_id, "--download", f"into{number}")
            found = content(f"into{number}") or {}
            self.assertEqual(found, {"a.log": sent} if sent else {})

    def change_at_upload(self, change_it):
        """Calls a function once, when an upload is asked for."""
        def look(record):
            if record.path == "/api/v2/attachments":
                self.box.on_request = None
                change_it()
        self.box.on_request = look


class OddMachines(HostileCase):
    """Pythons with parts missing, odd homes, closed streams."""

    def python(self, *args, **more):
        """A process of this Python, warnings as errors. Returns its Ran."""
        return self.ended(self.popen(sys.executable, "-B", "-W", "error", *args, **more))

    def wrapped(self, code, *args):
        """A process that runs `code` before it imports the script and calls main."""
        program = (f"import os, sys\nsys.path.insert(0, {HERE!r})\n{code}\nimport tofupilot_runs\n"
                   "sys.exit(tofupilot_runs.main())")
        return self.orderly(self.python("-c", program, *args))

    def test_no_command_leaves_a_warning_or_an_open_file(self):
        path = self.file("a.txt")
        for status, args in (
                (0, ["--help"]),
                (0, ["--version"]),
                (0, ["ls", "--all"]),
                (0, CREATE + ["--attach", path]),
                (0, ["ls", "--out", "o"]),
                (0, create("SN-2", *QUEUE)),
                (0, ["check", *QUEUE]),
                (0, ["queue", "move", "r", *QUEUE]),
                (2, ["create"]),
                (6, ["ls", "--url", CLOSED, *ONCE])):
            ran = self.orderly(self.python("-X", "dev", SCRIPT, *args))
            self.assertEqual(ran.status, status, ran)

    def test_a_python_that_is_too_old_shows_which_one_is_needed(self):
        pattern = os.path.join(PYENV, "versions", "[23].[57].*", "bin", "python")
        found = [shutil.which(name) for name in ("python2", "python2.7", "python3.5")]
        found = filter(None, found + glob.glob(pattern))
        old = [name for name in found if self.is_too_old(name)]
        if not old:
            self.skipTest("there is no Python before 3.6 on this machine")
        for name in old:
            ran = self.ended(self.popen(name, SCRIPT, "ls"), 1)
            self.assertIn("needs Python 3.6 or newer", ran.err)

    def is_too_old(self, python):
        code = "import sys; sys.exit(sys.version_info >= (3, 6))"
        if not POSIX and not python.endswith(".exe"):
            return False
        return subprocess.call([python, "-c", code], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0

    STREAM_ROWS = (
        (0, ["ls"]),
        (0, CREATE + ["--queue", "q"]),
        (0, ["check", "--queue", "q"]),
        (0, ["queue", "ls", "--queue", "q"]),
        (0, CREATE + ["--offline"]),
        (2, ["ls", "--x"]),
        (4, ["get", "--id", NOBODY]),
        (0, ["--help"]),
        (0, ["--version"]),
        (2, []),
        (0, ["ls", "-v", "--format", "csv"]),
        (2, ["rm", "--ids", "-"]),
        (0, ["create", "--example"]),
        (0, ["ls", "--dry-run"]))

    def test_standard_streams_that_are_missing_change_nothing_but_what_is_shown(self):
        """As under pythonw: sys.stdout and its like are None."""
        for missing in (["stdin"],
                        ["stdout"],
                        ["stderr"],
                        ["stdin", "stdout", "stderr"]):
            for status, args in self.STREAM_ROWS:
                streams = {name: Stream().as_text() for name in ("stdin", "stdout", "stderr")}
                streams.update(dict.fromkeys(missing))
                with mock.patch.multiple(sys, **streams):
                    self.assertEqual(runs.main(args), status, (missing, args))
        meta = self.ok("queue", "ls", *QUEUE, "--json").json["meta"]
        self.assertEqual(meta["sent"], 1)

    @unittest.skipUnless(POSIX, "Windows gives a process all three streams")
    def test_standard_streams_that_are_closed_change_nothing_but_what_is_shown(self):
        for closed, status, args in (((1,), 0, ["ls"]),
                                     ((2,), 4, ["get", "--id", NOBODY]),
                                     ((1, 2), 0, [*CREATE, *QUEUE]),
                                     ((0, 1, 2), 0, ["check"]),
                                     ((0, 1, 2), 0, [*create("SN-2"), "--offline"])):
            def close():
                for number in closed:
                    os.close(number)
            ran = self.python("-W", "ignore::ResourceWarning", SCRIPT, *args, preexec_fn=close)
            self.assertEqual(ran.status, status, (closed, args, ran))
            self.orderly(ran)

    def test_a_reader_that_went_away_is_no_failure(self):
        """`| head`: exit 0 without a word."""
        self.box.store.fill(20)
        for args in (["ls", "--all"],
                     ["ls", "--json"],
                     ["--help"],
                     ["check"],
                     ["queue", "--help"],
                     ["create", "--example"]):
            reader, writer = os.pipe()
            os.close(reader)
            process = self.start(*args, stdout=writer)
            os.close(writer)
            ran = self.ended(process, 0)
            self.assertEqual(ran.err, "", args)

    def test_a_home_that_is_missing_or_cannot_be_written_stops_only_the_queue_in_it(self):
        env = {"TOFUPILOT_HOME": os.path.join(self.file("a.txt", b""), "x")}    # root can write
        for args in (["ls"], CREATE + ["--queue", "q"],
                     ["check", "--queue", "q"]):
            self.ok(*args, env=env)
        self.assertIn("FAIL  queue", self.fails(6, "check", env=env).out)
        self.tells(6, "NOT stored", *CREATE, "--offline", env=env)
        for name in ("HOME", "USERPROFILE", "TOFUPILOT_HOME"):
            del self.env[name]
        self.run_script("ls", status=0)
        self.run_script("check", "--queue", "q", status=0)

    def lacking(self, *names):
        """A patch that takes modules away, as a Python does that was built without them."""
        return mock.patch.dict(sys.modules, dict.fromkeys(names))

    def test_a_python_without_ssl_does_all_that_needs_no_https(self):
        with self.lacking("ssl", "_ssl"):
            for args in (["ls"], CREATE, ["--version"],
                         [*CREATE, "--offline", *QUEUE],
                         ["queue", "send", *QUEUE]):
                self.ok(*args)
            self.assertIn("no ssl in this Python", self.ok("--version").out)
            for url in ("https://127.0.0.1:1", "https://api.example"):
                ran = self.fails(6, "ls", "--url", url)
                self.assertIn("has no ssl module", ran.err)
                self.assertIn("use a Python that has it", ran.err)
                self.assertNotIn("next try", ran.err)
            ran = self.fails(6, "check")
            self.assertIn("FAIL  openssl", ran.out)
            self.assertIn("ok    identity", ran.out)
            queued = self.ok(*create("SN-2", *QUEUE), "--url", "https://127.0.0.1:1")
            self.assertIn("has no ssl module", queued.out)

    def test_a_python_without_sqlite3_does_all_that_needs_no_queue(self):
        with self.lacking("sqlite3", "_sqlite3"):
            for args in (["ls"], CREATE, ["--version"]):
                self.ok(*args)
            ran = self.ok(*create("SN-2", *QUEUE))
            self.assertIn("no sqlite3", ran.err)
            self.assertIn("sent directly", ran.err)
            ran = self.fails(6, *CREATE, "--offline", *QUEUE)
            self.assertIn("NOT stored", ran.err)
            self.assertIn("no sqlite3", ran.err)
            self.assertNotIn("room on the disk", ran.err)
            self.tells(4, self.at("q"), "queue", "send", *QUEUE)
            self.assertRegex(self.fails(6, "check", *QUEUE).out, "FAIL  queue .*no sqlite3")
            self.assertRaises(runs.Unavailable, runs.store, BODY, queue="q")
            self.file("q", b"")
            self.tells(6, "no sqlite3", "queue", "ls", *QUEUE)
        self.assertEqual(len(self.stored()), 2)

    def test_a_process_of_a_python_without_modules_of_posix_or_ssl_works(self):
        lack = "for name in %r.split(): sys.modules[name] = None\n"
        codes = [lack % "ssl _ssl sqlite3 _sqlite3"]
        unlike_posix = lack % "fcntl ctypes readline termios resource"
        if POSIX:
            unlike_posix += "del os.O_NONBLOCK, os.getuid"
        codes.append(unlike_posix)
        for code in codes:
            for args in (["ls"], CREATE, ["get", "--help"]):
                self.assertEqual(self.wrapped(code, *args).status, 0)

    def test_importing_the_module_leaves_signals_and_the_path_alone(self):
        code = ("before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
                "path = list(sys.path)\nimport tofupilot_runs\n"
                "after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)\n"
                "assert before == after and path == sys.path")
        ran = self.python("-c", f"import signal, sys\nsys.path.insert(0, {HERE!r})\n{code}")
        self.assertEqual(ran.status, 0, ran)


class Neighbours(HostileCase):
    """Files of somebody else beside the script are not taken for Python's own."""
    NAMES = ("calendar", "string", "select", "signal", "json", "argparse", "socket", "ssl",
             "sqlite3", "random", "urllib", "email", "http", "hashlib", "csv")

    def setUp(self):
        super().setUp()
        self.place = self.at("place")
        os.mkdir(self.place)
        self.script = shutil.copy(SCRIPT, self.place)
        for name in self.NAMES + ("os",):
            path = os.path.join("place", name + ".py")
            self.file(path, b"raise SystemExit('somebody else')")

    def run_there(self, *words, env=()):
        """A process in the script's folder. Returns its Ran."""
        process = self.popen(sys.executable, "-B", *words, cwd=None, env=env)
        return self.ended(process, 0)

    def popen(self, *words, cwd=None, **more):
        folder, self.folder = self.folder, self.place
        try:
            return super().popen(*words, **more)
        finally:
            self.folder = folder

    def test_a_program_takes_its_own_folder_out_of_the_path(self):
        """Control: without `del sys.path[0]`, or after any import that is not built in."""
        queue = ("--queue", self.at("q"))
        for way in ([self.script],
                    ["-I", self.script],
                    ["-I", "-S", self.script],
                    ["-m", "tofupilot_runs"],
                    ["-E", self.script]):
            self.run_there(*way, *CREATE, *queue)
        self.run_there(self.script, "check", *queue)
        self.run_there("-m", "tofupilot_runs", "ls", "--format", "csv")

    def path_after(self, *flags, change="", env=()):
        """(sys.path before, after) of a program, after some change to the path before."""
        code = (f"import os, runpy, sys\n{change}\nbefore = list(sys.path)\n"
                "sys.argv = ['x', '--version']\n"
                "os._exit = lambda status: print('PATH', [before, sys.path])\n"
                f"runpy.run_path({SCRIPT!r}, run_name='__main__')")
        ran = self.run_there(*flags, "-c", code, env=env)
        return ast.literal_eval(ran.out.rpartition("PATH ")[2])

    def test_only_the_first_entry_of_the_path_goes(self):
        """Control: -I and -P have Python's own library first, which must stay.

        So must the folder in which Python itself lives.
        """
        before, after = self.path_after(change="sys.path.insert(1, '/somebody/elses')")
        self.assertEqual(after, before[1:])
        stays = [([], {}, "sys.path[0] = sys.prefix"),
                 (["-I"], {}, "")]
        if sys.version_info >= (3, 11):
            stays += [(["-P"], {}, ""),
                      ([], {"PYTHONSAFEPATH": "1"}, "")]
        for flags, env, change in stays:
            before, after = self.path_after(*flags, env=env, change=change)
            self.assertEqual(after, before, flags)


def locks_that_tell(tell):
    """The locks of the script call a function with the seconds of each wait."""
    class Lock:
        def __init__(self):
            self.lock = threading.Lock()
            self.release = self.lock.release
            self.locked = self.lock.locked

        def acquire(self, timeout=None):
            if timeout is None and not self.locked():
                return self.lock.acquire()
            tell(timeout)
            return self.lock.acquire(timeout=timeout)
    return mock.patch.object(runs._thread, "allocate_lock", Lock)


class Windows(HostileCase):
    """What Windows does differently, by patches; the tests of the other classes run there too."""

    def test_a_replace_waits_for_the_program_that_has_the_file_open(self):
        """N6. Control: without the loop in replace(), or with another word than 'open'."""
        for winerror, times, outcome in ((32, 3, None),
                                         (5, 3, None),
                                         (33, 9, None),
                                         (32, 99, runs.Error),
                                         (1, 1, PermissionError),
                                         (None, 1, PermissionError)):
            error = PermissionError(13, "in use")
            error.winerror = winerror
            waits = []
            with mock.patch.object(os, "replace", side_effect=[error] * times + [None]), \
                    mock.patch.object(time, "sleep", waits.append):
                if outcome:
                    self.assertRaises(outcome, runs.replace, "a", "b")
                else:
                    runs.replace("a", "b")
            self.assertLessEqual(sum(waits), 6)
            if outcome is None:
                self.assertEqual(len(waits), times)

    def test_output_onto_a_file_that_is_open_elsewhere_says_so(self):
        old = self.file("out.csv", b"old")
        self.shows(self.box.url + "/storage/x")
        error = PermissionError(13, "in use")
        error.winerror = 32
        with mock.patch.object(os, "replace", side_effect=error), \
                mock.patch.object(time, "sleep", lambda seconds: None):
            ran = self.fails(1, "ls", "--out", old)
            self.assertIn("another program has it open", ran.err)
            self.assertNotIn("make room", ran.err)
            self.tells(1, "another program has it open", *ATTACHED)
        self.assertEqual(content(old), b"old")
        self.assertNotIn(".part", " ".join(os.listdir(self.folder)))

    def test_a_name_that_the_system_refuses_is_told(self):
        """N1. Control: is_closed_pipe without the look at the error's file name."""
        passed = self.made()
        failed = self.made(outcome="FAIL", serial_number="SN-2")
        self.put(passed, "a.txt", b"x")
        refused = OSError(errno.EINVAL, "Invalid argument", "a?b")
        with mock.patch.object(os, "open", side_effect=refused):
            for args in (["ls", "--json", "--out", "a?b"],
                         ["get", passed, "--download", "to?dir"],
                         ["get", failed, "--exit-status", "--out", "a?b"],
                         ["ls", "--out", 'quoted"']):
                ran = self.fails(1, *args)
                self.assertIn("cannot write", ran.err)
                self.assertRegex(ran.err, "Invalid (argument|name)")

    def test_a_closed_pipe_of_windows_is_forgiven(self):
        """Writing to it fails with EINVAL, without a file name."""
        closed = mock.Mock(spec=["write", "flush", "isatty", "encoding"], encoding="utf-8")
        closed.write.side_effect = OSError(errno.EINVAL, "Invalid argument")
        closed.isatty.return_value = False
        self.made()
        for args in (["ls"],
                     ["ls", "--json"],
                     ["--help"],
                     ["queue", "--help"]):
            err = io.StringIO()
            with mock.patch.multiple(sys, stdout=closed, stderr=err):
                with mock.patch.object(runs, "ON_WINDOWS", True):
                    self.assertEqual(runs.main(args), 0)
            self.assertEqual(err.getvalue(), "")

    def test_a_wait_for_the_network_is_in_a_thread_and_ctrl_c_ends_it(self):
        """N2. Control: interruptible() that calls its work itself on Windows too."""
        threads = []
        real = runs.Transport.http_open
        ended, arrived = threading.Event(), threading.Event()

        def noted(transport, request):
            threads.append(threading.get_ident())
            try:
                return real(transport, request)
            finally:
                ended.set()

        def interrupted(timeout):
            if threading.current_thread() is threading.main_thread():
                self.assertTrue(arrived.wait(20))
                raise KeyboardInterrupt
        with mock.patch.object(runs, "ON_WINDOWS", True), \
                mock.patch.object(runs.Transport, "http_open", noted):
            self.ok("ls")
            self.assertEqual(len(threads), 1)
            self.assertNotEqual(threads[0], threading.get_ident())
            self.box.fault("slow", "GET .*", event=self.box.closing)
            self.box.on_request = lambda record: arrived.set()
            ended.clear()
            with locks_that_tell(interrupted):
                ran = self.fails(130, "ls")
            self.assertIn("stopped by Ctrl-C", ran.err)
            if POSIX:       # its socket was shut down; Wine does not wake up who waits for it
                self.assertTrue(ended.wait(20))

    def test_a_wait_lets_ctrl_c_in_every_fifth_of_a_second(self):
        """Control: a wait for the lock without a time, which Windows does not interrupt."""
        steps = []
        done = threading.Event()
        with locks_that_tell(steps.append):
            wait = runs.start_thread(done.wait)
            self.assertIsNone(wait(0.01))
            threading.Timer(0.01, done.set).start()
            self.assertTrue(wait())
        self.assertTrue(steps)
        self.assertLessEqual(max(steps), 0.25)

    def test_local_times_that_windows_has_no_offset_for_are_taken(self):
        """N3. Control: local_zone() without its except."""
        class Time(datetime.datetime):
            def astimezone(self, tz=None):
                if tz is None and not 1970 < self.year < 3000:
                    raise OSError(errno.EINVAL, "Invalid argument")
                return super().astimezone(tz)
        names = SimpleNamespace(**dict(vars(datetime), datetime=Time))
        with mock.patch.object(runs, "datetime", names):
            self.ok("ls", "--started-after", "1970-01-01")
            self.ok("ls", "--created-before", "3500-02-28")
            self.ok(*UNIT, "--started-at", "1960-02-29T00:00:00", "--ended-at",
                    "1960-02-29T00:00:42")
        first, _, last = self.sent()[:3]
        query, body = first[2], last[3]
        self.assertRegex(dict(query)["started_after"], r"^1970-01-01T00:00:00([+-]\d\d:\d\d|Z)$")
        self.assertRegex(body["started_at"], r"^1960-02-29T00:00:00([+-]\d\d:\d\d|Z)$")

    def test_a_user_without_a_home_gets_no_folder_named_tilde(self):
        """N8. Control: home() without its look at the tilde."""
        del self.env["TOFUPILOT_HOME"]
        without = {name: value for name, value in self.env.items()
                   if name not in ("HOME", "USERPROFILE", "HOMEDRIVE", "HOMEPATH")}
        self.env = without
        with mock.patch.object(os.path, "expanduser", lambda path: path), \
                mock.patch.object(runs, "ON_WINDOWS", True):
            ran = self.fails(2, *CREATE, "--offline")
            self.assertIn("no home folder", ran.err)
            self.assertIn("set TOFUPILOT_HOME=", ran.err)
            self.ok("ls")
            self.ok(*CREATE, "--offline", *QUEUE)
            self.ok("check", *QUEUE)
            ran = self.fails(2, "check")
            self.assertIn("FAIL  queue", ran.out)
            self.assertIn("ok    identity", ran.out)
        self.assertNotIn("~", "".join(os.listdir(self.folder)))

    def test_the_home_is_below_userprofile(self):
        os.mkdir(".tofupilot")
        fields = {"api_key": self.box.user_key, "base_url": self.box.url}
        path = self.file(os.path.join(".tofupilot", "credentials.json"),
                         json.dumps(fields).encode())
        os.chmod(path, 0o600)
        names = {"HOME": "/nowhere", "USERPROFILE": self.folder}
        with mock.patch.object(runs, "ON_WINDOWS", True), \
                mock.patch.dict(os.environ, names, clear=True):
            login = runs.find_login(warn=self.fail)
        self.assertEqual((login.url, login.key), (self.box.url, self.box.user_key))

    def test_an_attached_file_has_its_own_name_without_the_folders(self):
        path = self.file("C:\\data\\scope.png") if POSIX else self.file("scope.png")
        with mock.patch.object(os.path, "basename", ntpath.basename):
            self.assertIn(" scope.png ", self.ok(*CREATE, "--attach", path).out)

    def test_stars_after_attach_are_expanded_where_the_shell_does_not(self):
        """N5. Two that expand to one name are refused as elsewhere."""
        os.mkdir("files")
        for name in ("a.txt", "b.txt", "c.log"):
            self.file(os.path.join("files", name))
        pattern = os.path.join("files", "?.txt")
        with mock.patch.object(runs, "ON_WINDOWS", True):
            made = self.ok(*CREATE, "--attach", pattern, "--json").json["id"]
            self.assertEqual(self.attached(made), ["a.txt", "b.txt"])
            none = os.path.join("files", "*.bin")
            self.tells(2, "*.bin", *create("SN-2", "--attach", none))
        with mock.patch.object(runs, "ON_WINDOWS", False):
            self.fails(2, *create("SN-2", "--attach", pattern))

    def test_a_folder_after_attach_is_told_as_one(self):
        """N9: Windows itself says 'Permission denied'."""
        os.mkdir("files")
        for args in ([*CREATE, "--attach", "files"],
                     ["create-attachment", "--id", "a", "--file", "files"]):
            self.tells(2, "files is a folder", *args)

    def test_lists_with_a_mark_and_crlf_are_read(self):
        ids = "@" + self.file("ids", b"\xef\xbb\xbfa\r\nb\r\n\r\n\x1a")
        self.ok("ls", "--serial-numbers", ids)
        self.assertRegex(self.box.requests[-1].query, "^serial_numbers=a&serial_numbers=b&limit")


SIGNALS = (signal.SIGINT, signal.SIGTERM) if POSIX else (signal.SIGINT,)    # Ctrl-C on Windows


class Signals(HostileCase):
    """Ctrl-C and SIGTERM end every wait at once, with one line and without half a file."""

    def setUp(self):
        super().setUp()
        self.box.store.fill(5)
        self.path = self.file("a.txt")

    def stop_at(self, number, method, count, args):
        """Sends a signal when the count-th request of a method has come. Returns the Ran."""
        moment = threading.Event()
        hits = []

        def note(record):
            if record.method == method:
                hits.append(1)
            if len(hits) == count:
                moment.set()
        self.box.on_request = note
        process = self.start_interruptible(*args)
        self.assertTrue(moment.wait(20))
        return self.stop(process, number)

    def stop(self, process, number):
        for _ in range(4):      # one that comes just before a system call waits for its end
            self.interrupt(process, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
                break
        status, word = (130, "Ctrl-C") if number == signal.SIGINT else (143, "SIGTERM")
        ran = self.orderly(self.ended(process, status))
        self.assertIn(word, ran.err)
        return ran

    def assert_orderly_end(self, ran):
        self.assertEqual(ran.err.count("\n"), 1, ran)
        names = set(os.listdir(self.folder)) - {"q", "q.lock"}
        self.assertEqual(names, {"a.txt"})

    def test_a_wait_for_an_answer_ends(self):
        self.ok(*CREATE, "--offline", *QUEUE)
        rows = [("GET", 1, ["ls"]),
                ("GET", 1, ["check"]),
                ("POST", 1, CREATE),
                ("GET", 2, ["ls", "--all", "--page-size", "2", "--out", "o"]),
                ("POST", 1, ["queue", "send", *QUEUE])]
        for order, (method, count, args) in enumerate(rows):
            self.box.calm()
            self.box.fault("slow", method + " .*", skip=count - 1, times=None,
                           event=self.box.closing)
            number = SIGNALS[order % len(SIGNALS)]
            self.assert_orderly_end(self.stop_at(number, method, count, args))

    def test_an_upload_ends_and_its_run_is_told(self):
        for number in SIGNALS:
            self.box.calm()
            self.box.fault("slow", "PUT .*", event=self.box.closing)
            args = create(f"SN-{number}", "--json", "--attach", self.path)
            ran = self.stop_at(number, "PUT", 1, args)
            self.assert_orderly_end(ran)
            self.assertEqual(ran.error["id"], self.stored()[-1])

    def test_a_download_ends_and_leaves_no_half_file(self):
        half = raw_answer(b"x" * 1000, "Content-Length: 999999")
        self.shows(self.box.url + "/storage/y")
        self.box.fault("raw", "GET /storage/y", data=half, forever=b"x")
        args = ["get", "--id", "a", "--download", "."]
        self.assert_orderly_end(self.stop_at(signal.SIGINT, "GET", 2, args))

    def test_a_wait_between_two_tries_ends(self):
        self.says("GET /v2/runs", {}, 503, Retry_After="29")
        process = self.start_interruptible("ls")
        self.assertIn(b"next try in", process.stderr.readline())
        self.assert_orderly_end(self.stop(process, signal.SIGINT))
# ---- screens and report --------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen_row(number=0):
    """A row of a list with a serial that takes 12 columns."""
    return {"id": "3f1c2a90-0000-4000-8000-%012d" % number, "outcome": "FAIL",
            "unit": {"serial_number": "PCB01-000731", "part": None},
            "procedure": {"id": "p", "name": "FCT board"}, "duration": "PT1M35S",
            "started_at": "2026-05-19T08:00:00Z"}


def paged(*rows):
    return runs.Result.pages(iter([(list(rows), {"has_more": False})]), runs.RUN_COLUMNS)


def written(result, stream=None, **options):
    """What a Screen writes."""
    stream = stream or io.StringIO()
    runs.Screen(stream, **options).write(result)
    return stream.getvalue()


def on_terminal(result, width, **options):
    with mock.patch.dict(os.environ, {"COLUMNS": str(width), "NO_COLOR": "1"}):
        return written(result, Terminal(), **options)


class Screens(unittest.TestCase):
    """Tables, JSON, CSV: what a Screen writes of a Result."""

    def test_a_narrow_terminal_drops_the_id_and_keeps_outcome_and_serial(self):
        """Control: give the ID a greater importance than the serial."""
        for width, titles in ((40, "OUTCOME SERIAL"), (80, "ID OUTCOME SERIAL PROCEDURE STARTED")):
            lines = on_terminal(paged(screen_row()), width).splitlines()
            self.assertEqual(lines[0].split(), titles.split())
            self.assertIn("PCB01-00", lines[1])
            self.assertLess(max(map(len, lines)), width)
        self.assertIn("STATION", on_terminal(paged(screen_row()), 200))

    def test_why_an_entry_waits_is_whole_below_it_on_a_terminal_of_any_width(self):
        """Control: give ERROR a column like the others, which is cut or dropped."""
        reason = "phases[0].outcome: is empty; use one of PASS FAIL ERROR SKIP"
        row = {"client_run_ref": "3e1f7d020000", "state": "parked", "outcome": "PASS",
               "serial_number": "SN-0001", "tries": 0, "error": reason}
        rows = [row, dict(row, error=None)]
        for width in (40, 80, 200):
            result = runs.Result.table({}, rows, runs.QUEUE_COLUMNS)
            header, first, why, second = on_terminal(result, width).splitlines()
            self.assertIn("SN-0001", second)
            self.assertEqual(why, "  " + reason)
        text = written(runs.Result.table({}, rows, runs.QUEUE_COLUMNS))
        header, first, second = text.splitlines()
        self.assertEqual(header.split("\t")[-1], "ERROR")
        self.assertEqual(first.split("\t")[-1], reason)

    def test_columns_that_are_asked_for_are_never_dropped(self):
        """Control: leave keep_all out."""
        text = on_terminal(paged(screen_row()), 20, columns="id,outcome,duration")
        self.assertEqual(text.split()[:3], ["id", "outcome", "duration"])

    def test_cutting_a_very_long_name_is_quick(self):
        """Control: measure the whole text again for each character that is cut off."""
        calls = []
        real = runs.character_width
        with mock.patch.object(runs, "character_width",
                               lambda text: calls.append(1) or real(text)):
            self.assertEqual(runs.truncate("\u6e2c" * 100000, 11), "\u6e2c" * 4 + "...")
        self.assertLess(len(calls), 200100)

    def test_a_mistyped_column_is_told_with_the_name_that_was_meant(self):
        """Control: leave observe out. One whose parent is null is no mistake."""
        for format in ("table", "csv", "jsonl"):
            told = []
            written(paged(screen_row()), format=format, warn=told.append,
                    columns="id,unit.serial_numbr,unit.part.number")
            self.assertEqual(told, ["--columns: unit.serial_numbr is in none of the rows; "
                                    "did you mean unit.serial_number?"])

    def test_quiet_means_ids_in_every_format(self):
        """Control: let a format win."""
        for format in runs.FORMATS:
            text = written(paged(screen_row()), format=format, quiet=True)
            self.assertEqual(text, screen_row()["id"] + "\n", format)

    def test_json_is_closed_properly_when_a_page_fails(self):
        """Control: leave the finally out."""
        def pages():
            yield [screen_row()], {"has_more": True}
            error = runs.Unavailable("gone")
            error.cursor = 7
            raise error
        stream = io.StringIO()
        with self.assertRaises(runs.Unavailable):
            runs.Screen(stream, "json").write(runs.Result.pages(pages(), runs.RUN_COLUMNS))
        self.assertEqual(json.loads(stream.getvalue()),
                         {"data": [screen_row()], "meta": {"has_more": True, "next_cursor": 7}})

    def test_a_table_in_json_asks_for_its_meta_after_its_rows(self):
        """Control: call meta before the rows."""
        seen = []
        windows = (seen.append(n) or [{"id": n}] for n in range(3))
        result = runs.Result.table({"meta": lambda: {"count": len(seen)}}, windows, [("ID", "id")])
        self.assertEqual(json.loads(written(result, format="json")),
                         {"data": [{"id": 0}, {"id": 1}, {"id": 2}], "meta": {"count": 3}})

    def test_a_pipe_gets_tabs_and_full_values_and_nothing_that_moves_the_cursor(self):
        """Control: leave printable out."""
        row = dict(screen_row(), unit={"serial_number": "A\x1b[2J\n"})
        lines = written(paged(row)).splitlines()
        self.assertEqual(lines[0], "ID\tOUTCOME\tSERIAL\tPROCEDURE\tSTARTED")
        self.assertEqual(lines[1].split("\t")[2:], ["A\\x1b[2J\\n", "FCT board",
                                                    "2026-05-19T08:00:00Z"])

    def test_the_status_is_asked_for_when_all_is_written(self):
        """Control: take the status before the rows are read."""
        seen = []
        windows = (seen.append(n) or [{"id": n}] for n in range(2))
        result = runs.Result.table({}, windows, [("ID", "id")], exit_code=lambda: len(seen))
        self.assertEqual(written(result, quiet=True), "0\n1\n")
        self.assertEqual(result.exit_status(), 2)


class Report(unittest.TestCase):
    """One run for people, measurements as rows, yields."""

    def report(self, *measurements):
        run = dict(screen_row(), phases=[{"name": "p", "outcome": "FAIL",
                                          "measurements": list(measurements)}])
        result = runs.Result.runs(iter([run]), lambda run, screen: runs.run_report(
            run, screen, None, False, False), True)
        return written(result)

    def test_limits_are_written_as_people_do(self):
        """Control: always join the expressions."""
        for expressions, units, text in (
                (["x >= 3.1", "x <= 3.4"], "V", "3.1 to 3.4 V"),
                (["x >= 18.0"], "dBm", ">= 18.0 dBm"), (['x == "1.4.0"'], None, '== "1.4.0"'),
                (["x == True"], None, "== True"),
                (["x >= 1", "odd(x)"], "V", "x >= 1, odd(x)")):
            rules = [{"expression": expression} for expression in expressions]
            self.assertEqual(runs.limits_text({"validators": rules}, units), text)

    def test_a_text_that_was_measured_has_its_real_characters(self):
        """Control: show it as JSON in ASCII."""
        self.assertIn('"gr\xfcn"', self.report({"name": "m", "measured_value": "gr\xfcn"}))

    def test_every_failed_measurement_has_a_mark(self):
        """Control: mark numbers alone."""
        for value, limit, mark in ((17.1, 18.0, "<-- 0.9 below"), (True, False, "expected false"),
                                   ("1.3", "1.4.0", '<-- expected "1.4.0"'),
                                   ("x", None, "<-- failed")):
            rule = {"outcome": "FAIL", "expected_value": limit, "expression": "e"}
            self.assertIn(mark, self.report({"name": "m", "outcome": "FAIL", "validators": [rule],
                                             "measured_value": value}))

    def test_a_column_of_another_command_is_told_with_its_name_here(self):
        """Control: leave usual_path out."""
        run = {"id": 1, "unit": {"serial_number": "A", "part": {}}}
        entry = {"serial_number": "A", "unit": None}
        for row, asked, meant in ((run, "serial_number", "unit.serial_number"),
                                  (run, "part_number", "unit.part.number"),
                                  (run, "unit.part_number", "unit.part.number"),
                                  (entry, "units.serial_number", "serial_number")):
            column = runs.ColumnPath(asked)
            column.observe(row)
            self.assertRegex(column.warning(), f"did you mean {meant}\\?")

    def test_the_note_of_a_phase_that_did_not_pass_is_shown_on_one_line(self):
        """Control: leave note_lines out. A note may be long, hostile or of a wrong type."""
        for note, shown in (("assert 1 >  2\n at t.py\x1b[2J\n\nx", r"assert 1 > 2 at t.py\x1b[2J"),
                            (["odd"], '["odd"]')):
            phase = {"name": "p", "outcome": "ERROR", "docstring": note}
            lines = runs.phase_lines([phase], runs.Screen(io.StringIO()), True)
            self.assertEqual(lines[-1].strip(), "note: " + shown)
            self.assertEqual(runs.note_lines(dict(phase, outcome="PASS")), [])
        self.assertLess(len(runs.note_lines(dict(phase, docstring=99999 * "x"))[0]), 220)

    def test_a_limit_that_does_not_decide_is_a_warning(self):
        """Control: leave is_decisive out."""
        rule = {"outcome": "FAIL", "is_decisive": False, "expression": "x >= 1"}
        self.assertEqual(runs.limits_text({"validators": [rule]}, "V"), ">= 1 V WARN")

    def test_a_series_shows_its_count_and_smallest_largest_and_last_value(self):
        """Control: leave series_text out. A number that no float holds is passed over."""
        text = self.report({"name": "s", "data_series": [{"data": [3, 1, 10 ** 400, 2]}]})
        self.assertIn("4 points", text)
        self.assertIn("min 1  max 3  last 2", text)

    def test_csv_of_runs_has_a_row_for_each_measurement(self):
        """Control: write the run itself."""
        run = dict(screen_row(), phases=[{"name": "p", "retry_count": 1, "measurements": [
            {"name": "m", "measured_value": 1.5}, {"name": "s", "data_series": [{"data": [1]}]}]}])
        for format, series in (("csv", "1 points"), ("jsonl", [[1]])):
            text = written(runs.Result.runs(iter([run]), None, True), format=format)
            rows = (list(csv.DictReader(io.StringIO(text))) if format == "csv"
                    else list(map(json.loads, text.splitlines())))
            self.assertEqual([str(row["attempt"]) for row in rows], ["2", "2"])
            self.assertEqual(rows[1]["value"], series)

    def test_yield_is_the_last_run_and_first_pass_yield_the_first(self):
        """Control: take any pass as passed."""
        history = (("A", "10", "PASS"), ("A", "11", "FAIL"), ("B", "10", "FAIL"),
                   ("B", "11", "PASS"), ("C", "10", "PASS"), ("D", "10", "PASS"))
        rows = [dict(screen_row(), unit={"serial_number": serial}, outcome=outcome,
                     started_at=f"2026-05-19T{hour}:00:00Z") for serial, hour, outcome in history]
        for order in (rows, rows[::-1]):
            document, lines = runs.summarize(order)
            row = document["procedures"][0]
            self.assertEqual((row["units"], row["yield"], row["first_pass_yield"]), (4, .75, .75))
            self.assertIn("last run here passed", "\n".join(lines))


class Workbook(unittest.TestCase):
    """--format xlsx, read with zipfile and an XML parser."""

    def cells(self, values):
        from xml.etree import ElementTree
        stream = io.BytesIO()
        row = dict(enumerate(values))
        paths = [str(number) for number in row]
        row = {str(key): value for key, value in row.items()}
        runs.Screen(stream, "xlsx", ",".join(paths)).write(paged(row))
        with zipfile.ZipFile(stream) as archive:
            root = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        row = list(root.iter("{*}row".replace("{*}", "{%s}" % runs._SHEET_NAMESPACE)))[1]
        return [(cell.get("t"), "".join(cell.itertext())) for cell in row]

    def test_text_is_text_and_numbers_are_numbers(self):
        """Control: write numbers in text as numbers."""
        for text in ("00042", "8901234567890123456", "3E5", "=1+1", "<&>"):
            self.assertEqual(self.cells([text]), [("inlineStr", text)])
        self.assertEqual(self.cells([1.5, 10 ** 18, True, "\x1b"]), [
            (None, "1.5"), ("inlineStr", str(10 ** 18)), ("b", "1"), ("inlineStr", "\\x1b")])

    def test_json_in_a_cell_has_its_real_characters(self):
        """Control: write it in ASCII, as for a stream."""
        value = {"name": "M\xfcller"}
        self.assertEqual(self.cells([value]), [("inlineStr", '{"name": "M\xfcller"}')])
        self.assertEqual(runs.csv_text(value), '{"name": "M\xfcller"}')
        self.assertEqual(runs.csv_text(["\udc80", "\x1b"]), '["\\udc80", "\\u001b"]')

    def test_times_are_dates_and_durations_seconds(self):
        """Control: leave the names of the columns out."""
        self.assertIn('<c s="2"><v>46', runs.workbook_cell("2026-05-19T08:00:00Z", "started_at"))
        self.assertEqual(runs.workbook_cell("PT1M35S", "duration"), "<c><v>95.0</v></c>")

    def test_a_terminal_gets_no_workbook(self):
        """Control: leave the question for a terminal out."""
        with self.assertRaisesRegex(runs.BadInput, "xlsx needs --out or a pipe"):
            written(paged(screen_row()), Terminal(), format="xlsx")

    def test_a_failed_page_goes_on_as_an_error_and_leaves_no_workbook(self):
        """Control: write the parts in any case."""
        def pages():
            yield [screen_row()], {}
            raise runs.Unavailable("gone")
        stream = io.BytesIO()
        with self.assertRaises(runs.Unavailable):
            runs.Screen(stream, "xlsx").write(runs.Result.pages(pages(), runs.RUN_COLUMNS))
        with zipfile.ZipFile(stream) as archive:
            self.assertNotIn("xl/workbook.xml", archive.namelist())


# ---- tests: queue --------------------------------------------------------------------------------

FORGE = r"""
import importlib.util, json, os, random, signal, sys
import email.utils, hashlib, http.client, mimetypes, sqlite3, ssl, threading, urllib.request
spec = importlib.util.spec_from_file_location("tofupilot_runs", sys.argv[1])
runs = sys.modules["tofupilot_runs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

for line in sys.stdin:
    folder, env, argv, patch, n, alarm = json.loads(line)
    has_fork = hasattr(os, "fork")
    pid = os.fork() if has_fork else 0
    if not has_fork:
        print(os.getpid(), flush=True)
    if not pid:
        status = 99
        try:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(env)
            for number, name in enumerate([os.devnull] + sys.argv[2:]):
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
                file = os.open(name, flags, 0o600)
                os.dup2(file, number)
                os.close(file)
            random.seed()
            exec(patch, {"runs": runs, "os": os, "sys": sys, "n": n})
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, alarm)     # uncaught: as by SIGKILL
            status = runs.main(argv)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    print(pid, file=sys.__stdout__, flush=True)
    status = os.waitpid(pid, 0)[1]
    print(-(status & 127) or status >> 8, file=sys.__stdout__, flush=True)
"""
AT_STATEMENT = """
real, seen = runs.Queue.sql, [0]
def run(self, sql, *args):
    seen[0] += 1
    if %s
    return real(self, sql, *args)
runs.Queue.sql = run
"""
KILL = AT_STATEMENT % "seen[0] == n: os.kill(os.getpid(), 9)"   # on Windows: TerminateProcess
KILL_STATUS = -9 if POSIX else 9
HAS_FORK = hasattr(os, "fork")
WINE_FAILED = 1359      # Wine's "Internal error", seen once at the start of a process
FULL_DISK = AT_STATEMENT % """seen[0] >= n and sql[:6] in ("INSERT", "UPDATE", "COMMIT", "PRAGMA"):
        raise self.unusable("database or disk is full")"""
NO_LOOK = "runs.Client.find_existing_run = lambda *args, **more: None\n"
NO_LOCK = """import contextlib
runs.Queue.sender_lock = contextlib.contextmanager(lambda self: iter([True]))
"""
HTML = {"Content-Type": "text/html"}


@functools.lru_cache(None)
def compiled_script():
    """The path of the script in compiled form; compiling it takes longer than all else in it."""
    folder = tempfile.mkdtemp("", "compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return py_compile.compile(SCRIPT, os.path.join(folder, "tofupilot_runs.pyc"), doraise=True)


class Forge:
    """A process that has loaded the script and forks for each command line: 10 ms, not 100.

    One command at a time. `patch` is code that sees runs, os, sys and n; `alarm`: it is killed
    after so many seconds. On Windows, which has no fork, the process runs one command line and
    the next process is started ahead of need; a kill is TerminateProcess.
    """

    def __init__(self):
        self.folder = tempfile.mkdtemp("", "forge-")
        self.output = [os.path.join(self.folder, "out"), os.path.join(self.folder, "err")]
        self.alarm = self.pid = 0
        self.spawn()

    def spawn(self):
        words = [sys.executable, "-I", "-S", "-B", "-W", "error", "-c", FORGE, compiled_script(),
                 *self.output]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        try:
            self.process = subprocess.Popen(words, **pipes)
        except OSError as error:
            if getattr(error, "winerror", None) != WINE_FAILED:
                raise
            self.process = subprocess.Popen(words, **pipes)

    def start(self, folder, env, argv, patch="", n=0, alarm=0):
        """Begins a command line. Returns the ID of its process; end() must follow."""
        self.alarm = alarm
        job = json.dumps([folder, env, list(argv), patch, n, alarm])
        self.process.stdin.write(job.encode() + b"\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def end(self):
        """Waits for it. Returns its Ran, with a status of KILLED if it was killed."""
        if HAS_FORK:
            status = int(self.process.stdout.readline())
            return Ran(status, *map(content, self.output))
        with self.process:
            try:
                self.process.wait(self.alarm or 60)
            except subprocess.TimeoutExpired:
                os.kill(self.pid, 9)
        ran = Ran(self.process.returncode, *map(content, self.output))
        self.spawn()
        return ran

    def run(self, *args, **more):
        self.start(*args, **more)
        return self.end()

    def close(self):
        with self.process:
            self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def on_server(box):
    """For each serial a list of its runs' attachments, each a list of (name, size, bytes)."""
    found = {}
    opener = build_opener(ProxyHandler({}))
    with contextlib.closing(runs.Client(box.url, box.user_key)) as client:
        for row in client.iterate():
            files = []
            for file in client.get(row["id"])["attachments"]:
                data = file["size"] and opener.open(file["download_url"]).read()
                files.append((file["name"], file["size"], data))
            found.setdefault(row["unit"]["serial_number"], []).append(files)
    return found


def account(found, expected):
    """What is wrong with a server's content. `expected`: {serial: {name: bytes}}, a run each."""
    wrong = collections.Counter(unknown=len(set(found) - set(expected)))
    for serial, files in expected.items():
        if serial not in found:
            wrong["lost"] += 1
            continue
        wrong["doubled"] += len(found[serial]) - 1
        for rows in found[serial]:
            names = [name for name, _, _ in rows]
            wrong["files missing"] += len(set(files) - set(names))
            wrong["files doubled"] += len(names) - len(set(names))
            for name, size, data in rows:
                if not size:
                    wrong["files empty"] += 1
                elif files.get(name) != data:
                    wrong["files changed"] += 1
    return {what: count for what, count in wrong.items() if count}


class KilledHere(BaseException):
    """Stands for the end of the process; nothing catches it."""


@contextlib.contextmanager
def killed_at(number):
    """From the statement of this number on none reaches a queue file: as after a kill.

    What SQLite has not committed is rolled back when the connections are closed. Yields a list
    that holds the count of statements.
    """
    real = runs.Queue.sql
    seen = [0]

    def sql(queue, statement, *values):
        seen[0] += 1
        if number and seen[0] >= number:
            raise KilledHere
        return real(queue, statement, *values)
    with patch_queue("sql", sql), contextlib.suppress(KilledHere):
        yield seen


def rows_of(path, statement, *values):
    """The rows (dicts) of a statement on a queue file, by a connection that is closed again."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(statement, values)]


def body_of(serial):
    """The request of a run."""
    return dict(BODY, serial_number=serial)


def serials(count):
    return [f"S{number}" for number in range(count)]


def patch(name, *value, **more):
    """The script with another value under a name, for as long as a with block."""
    return mock.patch.object(runs, name, *value, **more)


def without_threads():
    """The script on a machine where no thread can be started."""
    return mock.patch.object(runs._thread, "start_new_thread", side_effect=RuntimeError("none"))


def patch_queue(name, *value, **more):
    """The same for a method of Queue."""
    return mock.patch.object(runs.Queue, name, *value, **more)


NO_QUEUE = {"TOFUPILOT_QUEUE": ""}      # variables of a create that goes directly


def phase_named(name):
    """A phase without measurements."""
    return {"name": name, "outcome": "PASS", "started_at": BEGIN, "ended_at": END}


class QueueCase(Case):
    """A test with a sandbox and the queue file self.path, that TOFUPILOT_QUEUE names."""
    place = RAM     # nothing here depends on fsync
    forge = None
    files = {"a.txt": b"a" * 70000, "b.txt": b"b"}

    @classmethod
    def setUpClass(cls):
        cls.forge = Forge()

    @classmethod
    def tearDownClass(cls):
        cls.forge.close()

    def setUp(self):
        super().setUp()
        self.use(self.box)
        self.attach = ["--attach"]
        for name, data in self.files.items():
            self.attach.append(self.file(name, data))

    def use(self, box, name="line"):
        """From now on commands go to this sandbox, with another queue file."""
        self.box = box
        self.path = self.at(name + ".queue")
        named = {"TOFUPILOT_URL": box.url, "TOFUPILOT_API_KEY": box.user_key,
                 "TOFUPILOT_QUEUE": self.path}
        self.env.update(named)
        os.environ.update(named)

    def nameless(self, *names):
        """From now on these variables are not set."""
        for name in names or ["TOFUPILOT_URL"]:
            self.env.pop(name, None)
            os.environ.pop(name, None)

    def do(self, *argv, status=0, env=None, box=None, patch="", n=0):
        """Runs a command line in a process of its own. Returns its Ran. `patch`: see Forge."""
        env = dict(self.env, **(env or {}))
        if box:
            env.update(TOFUPILOT_URL=box.url, TOFUPILOT_API_KEY=box.user_key)
        ran = self.forge.run(self.folder, env, argv, patch=patch, n=n)
        if status is not None:
            self.assertEqual(ran.status, status, (argv, ran))
        if ran.status != KILL_STATUS:
            self.assertNotRegex(ran.err, "Traceback|unexpected")
        elif POSIX:     # Wine leaves connections of a killed process open
            # Without client_run_ref the next look sees what is stored, not what is under way.
            is_done = (box or self.box).all_end_within(10)
            self.assertTrue(is_done, "the server is at work on what the killed process sent")
        return ran

    def until_done(self, step, least, first=1, stride=1):
        """step(n) is killed at its n-th point, for some n, until it comes to its end."""
        for number in range(first, 999, stride):
            ran = step(number)
            if ran.status != KILL_STATUS:
                break
        self.assertEqual(ran.status, 0, ran)
        self.assertGreater(number, least)

    def offline(self, *serials):
        for serial in serials:
            self.keep(serial)

    def with_files(self, serial):
        """Stores a run with self.files. Returns its command line."""
        words = create(serial, "--offline", *self.attach)
        self.ok(*words)
        return words

    def create(self, serial, *more, status=0, outcome="PASS", procedure="proc_abc", **options):
        """create in this process, which must end so. Returns its Ran. `options`: see inside."""
        words = create(serial, *more, outcome=outcome, procedure=procedure)
        return self.fails(status, *words, **options)

    def keep(self, serial, *more, **options):
        """The same with --offline."""
        return self.create(serial, "--offline", *more, **options)

    def send(self, status=0, *more, **options):
        """queue send in this process, which must end so. Returns its Ran."""
        return self.fails(status, "queue", "send", *more, **options)

    def send_to(self, box, status=0, *more):
        """The same with the URL and the key of another sandbox."""
        key = {"TOFUPILOT_API_KEY": box.user_key}
        return self.send(status, "--url", box.url, *more, env=key)

    def retry(self, status=0, *more, **options):
        """queue retry in this process, which must end so. Returns its Ran."""
        return self.fails(status, "queue", "retry", *more, **options)

    def has(self, **states):
        """Asserts how many entries are in each state, and that there are no others."""
        self.assertEqual(self.states(), states)

    def store(self, serial, **files):
        """Stores a run with files given as bytes, by the module's function."""
        return runs.store(body_of(serial), list(files.items()), queue=self.path)

    def listed(self, *more):
        """What queue ls --json shows of the entries."""
        return self.ok("queue", "ls", "--json", *more).json["data"]

    def ref(self, serial):
        """The beginning of the ref of a serial's entry."""
        rows = self.sql("SELECT ref FROM entry WHERE serial_number = ?", serial)
        return rows[0]["ref"][:12]

    def count(self, table, path=None):
        """How many rows a table has."""
        rows = self.sql(f"SELECT count(*) AS n FROM {table}", path=path)
        return rows[0]["n"]

    def sql(self, statement, *values, path=None):
        return rows_of(path or self.path, statement, *values)

    def states(self, path=None):
        """How many entries are in each state."""
        rows = self.sql("SELECT state, count(*) AS count FROM entry GROUP BY state", path=path)
        return {row["state"]: row["count"] for row in rows}

    def entry(self, serial):
        """The row of a serial's entry."""
        row, = self.sql("SELECT * FROM entry WHERE serial_number = ?", serial)
        return row

    def posts(self, field="serial_number"):
        """What the creates said that arrived, in their order."""
        found = []
        for record in self.box.requests:
            if record.method == "POST" and re.match("/api/v2/runs($|-of-)", record.path):
                found.append(json.loads(record.body.decode())[field])
        return found

    def when(self, serial, kind, **options):
        """A fault for all creates of one serial, in whatever lane they come."""
        word = b'"%s"' % serial.encode()

        def strike(record):
            if record.path == "/api/v2/runs" and word in (record.body or b""):
                record.path += "-of-" + serial
        self.box.on_request = strike
        self.box.fault(kind, "POST /v2/runs-of-" + serial, times=None, **options)

    def calm(self):
        self.box.calm()
        self.box.on_request = None

    def intact(self, *serials, box=None, **with_files):
        """Asserts that the server has these runs, once, and no others; some with self.files."""
        expected = dict({serial: {} for serial in serials}, **with_files)
        self.assertEqual(account(on_server(box or self.box), expected), {})

    def delivered(self, *serials, at=(), how="retry", **with_files):
        """Sends this queue (or those), without faults; then the server must have these runs."""
        self.calm()
        for path in at or [self.path]:
            self.ok("queue", how, "--queue", path)
        self.intact(*serials, **with_files)

    def due(self):
        """Ends all waits."""
        self.sql("UPDATE entry SET next_try_at = 0")


class Queueing(QueueCase):
    """create with a queue, and the queue commands."""

    def test_a_create_with_a_queue_is_sent_at_once(self):
        self.nameless("TOFUPILOT_QUEUE")
        first = self.do(*create("A", "--queue", self.path, "--json")).json
        self.assertEqual(first, {"id": first["id"], "queued": False,
                                 "client_run_ref": self.entry("A")["ref"]})
        ran = self.do(*create("A", "--queue", self.path, "-q"))
        self.assertEqual(ran.out, first["id"] + "\n")
        ran = self.do(*create("A", "--queue", self.path))
        self.assertIn(first["id"], ran.out)
        self.assertEqual(self.posts(), ["A"])
        self.has(sent=1)

    def test_without_a_network_it_is_queued_and_the_next_create_sends_all(self):
        self.box.fault("drop-before", times=None)
        said = self.do(*create("A", "--json")).json
        self.assertIsNone(said["id"])
        self.assertTrue(said["queued"])
        ran = self.do(*create("B", "-q"))
        self.assertEqual(ran.out, "")
        ran = self.do(*create("B"))
        self.assertIn("Queued", ran.out)
        self.calm()
        self.due()
        self.do(*create("C"))
        self.intact("A", "B", "C")

    def test_offline_stores_without_a_key_in_a_file_that_is_marked_and_private(self):
        self.nameless("TOFUPILOT_API_KEY", "TOFUPILOT_URL")
        self.do(*create("A", "--offline"))      # what it loads is tested with the command line
        if POSIX:
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        for pragma, value in (("application_id", 0x54465251), ("user_version", 1),
                              ("auto_vacuum", 2)):
            self.assertEqual(self.sql("PRAGMA " + pragma), [{pragma: value}])
        self.has(waiting=1)
        self.assertEqual(self.box.connections, 0)

    def test_without_a_name_the_queue_is_in_the_home(self):
        self.nameless("TOFUPILOT_QUEUE")
        self.offline("A")
        self.assertEqual(self.states(self.at("home", "runs.queue")), {"waiting": 1})
        self.create("B")      # no queue was asked for
        self.assertEqual(self.posts(), ["B"])
        self.send()
        self.intact("A", "B")

    def test_a_home_that_is_not_yet_there_is_made_for_its_user_alone(self):
        self.nameless("TOFUPILOT_QUEUE")
        for name in "new" + os.sep, os.path.join(".", "rel"):
            self.keep("A", env={"TOFUPILOT_HOME": name})
            self.assertTrue(os.path.exists(os.path.join(name, "runs.queue")))
            if POSIX:
                self.assertEqual(stat.S_IMODE(os.stat(name).st_mode), 0o700)

    def test_the_same_create_is_one_entry_and_more_files_add_what_is_missing(self):
        _, a, b = self.attach
        for more in ((a,), (a,), (b,), (a, b)):
            self.keep("A", "--attach", *more)
        self.assertEqual([row["attachments"] for row in self.listed()], [2])
        self.send()
        self.intact(A=self.files)
        self.create("A", "--attach", a, self.file("c.txt"))
        self.intact(A=dict(self.files, **{"c.txt": b"content\n"}))
        self.assertEqual(self.posts(), ["A"])

    def test_files_that_are_added_while_their_run_is_sent_go_too(self):
        """They come when the first is linked. Control: without the look in make_receipt they are
        dropped.
        """
        words = create("A", "--offline", "--attach")
        self.ok(*words, self.file("first.txt"))
        late = self.file("late.txt")

        def add(record):
            if record.method == "PATCH":
                self.box.on_request = None
                self.run_script(*words, late, status=0)
        self.box.on_request = add
        for _ in range(2):
            self.do("queue", "send")
        self.intact(A={"first.txt": b"content\n", "late.txt": b"content\n"})
        self.assertEqual(self.listed(), [])

    def test_one_reference_is_one_content_in_the_queue_too(self):
        mine = ("--client-run-ref", "mine", "--offline")
        self.create("A", *mine)
        self.create("A", *mine)
        for _ in range(2):        # waiting, then a receipt
            ran = self.create("SN-2", *mine, status=2)
            self.assertIn("another run's", ran.err)
            self.send()
        self.intact("A")

    def test_what_was_sent_before_is_not_told_as_new(self):
        first = self.create("A").out
        again = self.create("A").out
        self.assertEqual(again, first.replace("Created run", "Already there: run"))
        ran = self.fails(4, "queue", "get", self.ref("A"), "--json")
        self.assertIn("is gone", ran.err)
        self.offline("B")
        self.ok("queue", "move", "stick")
        ran = self.keep("B")
        self.assertIn("moved to " + self.at("stick"), ran.out)

    def test_a_receipt_answers_for_its_origin_and_for_no_other(self):
        run_id = self.do(*create("A", "-q", *self.attach)).out
        self.box.fault("drop-before", times=None)
        self.box.requests.clear()
        ran = self.do(*create("A", "-q"))
        self.assertEqual(ran.out, run_id)
        self.assertEqual(self.box.requests, [])
        other = self.another()
        ran = self.do(*create("A", "--json", *self.attach), box=other)
        self.assertFalse(ran.json["queued"])
        self.intact(box=other, A=self.files)

    def test_ls_get_rm_send_and_retry_print_the_documents_that_are_promised(self):
        self.keep("A", "--client-run-ref", "ref-1", *self.attach)
        self.keep("B", "--client-run-ref", "ref-2", outcome="FAIL")
        document = self.ok("queue", "ls", "--json").json
        size = os.path.getsize(self.path)
        self.assertEqual(document["meta"], {
            "file": self.path,
            "waiting": 2,
            "parked": 0,
            "sent": 0,
            "bytes": size})
        row = document["data"][0]
        age = time.time() - runs.epoch(row["stored_at"])
        self.assertLess(abs(age), 60)
        self.assertEqual(dict(row, stored_at=0, next_try_at=0), {
            "client_run_ref": "ref-1",
            "state": "waiting",
            "outcome": "PASS",
            "tries": 0,
            "serial_number": "A",
            "procedure_id": "proc_abc",
            "stored_at": 0,
            "next_try_at": 0,
            "error": None,
            "run_id": None,
            "attachments": 2})
        request = self.ok("queue", "get", "ref-1", "--json").json
        self.assertEqual(request, dict(BODY, serial_number="A", client_run_ref="ref-1"))
        for status, ref in ((2, "ref"), (4, "x"), (4, "ref-11"), (0, "ref-2")):
            self.fails(status, "queue", "rm", ref)
        sent = self.send(0, "--json").json
        row, = self.listed("--sent")
        self.assertEqual(row["state"], "sent")
        self.assertEqual(sent, {
            "sent": 1,
            "waiting": 0,
            "parked": 0,
            "runs": [{"client_run_ref": "ref-1", "id": row["run_id"]}]})
        self.assertEqual(self.listed(), [])
        ran = self.retry(0, "--json")
        self.assertEqual(ran.json, {"sent": 0, "waiting": 0, "parked": 0, "runs": []})
        self.intact(A=self.files)

    def test_get_feeds_a_create_and_saves_the_files(self):
        self.keep("A", "--set", "shift=A", *self.attach)
        ref = self.listed()[0]["client_run_ref"]
        request = self.ok("queue", "get", ref[:6], "--json").out
        self.ok("queue", "get", ref[:6], "--out", "named.json")
        self.assertEqual(content("named.json").decode(), request)
        self.ok("queue", "get", ref[:6], "--download", "saved")
        self.assertEqual(content(self.at("saved")), self.files)
        created = self.ok("create", "--body", "-", "--json", input=request.encode())
        self.assertEqual(created.json["client_run_ref"], ref)
        self.intact(A=self.files)

    def test_a_file_whose_bytes_are_gone_is_told_and_not_saved_empty(self):
        self.with_files("A")
        self.sql("DELETE FROM chunk WHERE file = (SELECT min(id) FROM file)")
        ran = self.inside("queue", "get", self.ref("A"), "--download", "d")
        self.assertRegex(ran.err, r"a\.txt")
        self.assertNotIn("a.txt", content(self.at("d")) or {})

    def test_a_file_that_is_up_already_can_still_be_had(self):
        """Until its entry is a receipt its bytes are here."""
        self.with_files("A")
        self.box.fault("status", "PATCH /v2/runs/{id}")
        self.send(6)
        self.ok("queue", "get", self.ref("A"), "--download", "d")
        self.assertEqual(content(self.at("d")), self.files)

    def test_a_ref_that_is_no_text_is_no_bug(self):
        self.offline("A")
        for ref in "\udcfc", "\x00", "%", "'":
            self.fails(4, "queue", "get", ref)

    def test_no_queue_file_is_exit_4_with_its_full_path(self):
        for command in (["send"], ["retry"], ["ls"], ["get", "x"], ["rm", "x"], ["move", "y"],
                        ["fix", "x", "--outcome", "PASS"]):
            ran = self.fails(4, "queue", *command, "--queue", "typo.queue")
            self.assertIn(self.at("typo.queue"), ran.err)
        self.assertEqual(glob.glob("*queue*"), [])

    def test_dry_run_leaves_the_queue_as_it_is(self):
        self.offline("A")
        before = content(self.path)
        ran = self.send(0, "--dry-run")
        self.assertEqual([json.loads(line)["method"] for line in ran.out.splitlines()], ["POST"])
        ref = self.ref("A")
        for words in (("rm", ref), ("move", "other"), ("fix", ref, "--outcome", "FAIL")):
            answer = self.fails(2, "queue", *words, "--dry-run")
            self.assertIn("--dry-run", answer.err)
        self.assertEqual(content(self.path), before)
        self.assertEqual(self.sent(), [])
        self.send()
        self.intact("A")

    def test_a_second_sender_says_so_and_leaves(self):
        """Control: with the lock patched away the second one sends too: twice, on an old server."""
        self.box.store.knows_ref = False
        for serial, patch, runs_made in (("A", "", 1), ("AA", NO_LOCK + NO_LOOK, 2)):
            arrived, go_on = threading.Event(), threading.Event()
            self.offline(serial)

            def hold(record, arrived=arrived, go_on=go_on):
                if record.method == "POST" and not arrived.is_set():
                    arrived.set()
                    go_on.wait(30)
            self.box.on_request = hold
            first = self.start("queue", "send")
            self.assertTrue(arrived.wait(30))
            second = self.do("queue", "send", patch=patch)
            go_on.set()
            self.ended(first, 0)
            self.assertEqual("another process" in second.out + second.err, not patch)
            self.assertEqual(len(on_server(self.box)[serial]), runs_made)

    def test_a_parked_run_keeps_saying_5_until_somebody_deals_with_it(self):
        self.offline("A")
        self.box.fault("status", "POST /v2/runs", status=422, body={"message": "bad\x1b[31m"})
        ran = self.send(5)
        self.assertNotIn("\x1b", ran.out)
        ran = self.send(5, "--json")
        self.assertEqual(ran.error["exit_code"], 5)
        ran = self.send(5)
        self.assertIn("1 parked", ran.out)
        ran = self.create("B")
        self.assertIn("parked", ran.err)
        self.assertIn("bad", self.listed()[0]["error"])
        self.assertEqual(self.posts(), ["A", "B"])
        ran = self.fails(5, "check")
        self.assertIn("FAIL  queue", ran.out)
        self.retry(0, self.ref("A"))
        self.intact("A", "B")
        ran = self.send()
        self.assertEqual(ran.err, "")

    def test_what_waits_for_its_time_is_told_with_the_time(self):
        self.offline("A")
        self.box.fault("status", "POST /v2/runs", status=503, headers={"Retry-After": "3000"})
        self.do("queue", "send", status=6)
        answer = self.do("queue", "send")
        self.assertEqual(answer.out, "")      # cron mails what is written
        ran = self.send(0, tty=True)
        self.assertRegex(ran.out, r"\d 0 sent, 1 waiting, 0 parked; next try in \d+m")
        answer = self.do("queue", "retry")
        self.assertRegex(answer.out, "sent A PASS as run")

    def test_an_upload_whose_end_was_not_answered_is_not_made_again(self):
        """Control: without the save() between initialize and PUT it is."""
        self.with_files("A")
        self.box.fault("status", "POST /v2/attachments/{id}/finalize")
        self.do("queue", "send", status=6)
        self.delivered(A=self.files)
        self.assertEqual(len(self.sent("PUT")), len(self.files))

    def test_jitter_sleeps_before_the_lock_is_taken(self):
        self.offline("A")
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            self.run_script("queue", "send", status=0)      # nobody keeps it out
        clock = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=sleep,
                                strftime=time.strftime)
        with patch("time", clock):
            self.send(0, "--jitter", "60")
        self.assertEqual(len(slept), 1)
        self.assertEqual(self.posts(), ["A"])

    def test_entries_are_read_a_few_at_a_time(self):
        """No list of all entries is made. Control: fetch all, and a window is larger."""
        self.offline(*serials(7))
        real = runs.Queue.sql
        most = []

        def sql(queue, statement, *values):
            rows = real(queue, statement, *values)
            if "FROM entry" in statement:
                most.append(len(rows))
            return rows
        with patch("WINDOW", 3), patch_queue("sql", sql):
            self.assertEqual(len(self.listed()), 7)
            self.ok("check")
            self.assertEqual(self.send(0, "--dry-run").out.count("\n"), 7)
            self.ok("queue", "move", "stick")
            sent = self.send(0, "--json", "--queue", "stick").json
        ids = {row["id"] for row in sent["runs"]}
        self.assertEqual(len(ids), 7)
        self.assertEqual(max(most), 3)

    def test_the_cap_of_a_wait_holds_and_retry_after_is_spread(self):
        for tries in 0, 5, 12, 4000:
            most = min(3600, 15 * 2 ** min(tries, 12))
            found = [runs.delay(tries, 15) for _ in range(200)]
            self.assertTrue(0 <= min(found) and max(found) <= most)
            self.assertGreater(max(found), 0.8 * most)
        found = [runs.delay(0, 15, 100) for _ in range(200)]
        self.assertTrue(100 <= min(found) <= 110 and 190 <= max(found) <= 200)
        self.assertEqual(runs.delay(0, 15, 3600), 3600)


class ContentOfRuns(QueueCase):
    """A queue turns no run away for its content, and queue fix corrects it in place."""

    def store_body(self, text, *more):
        """create --offline of a body that is refused. Returns the document."""
        path = self.file("body.json", text)
        ran = self.fails(5, "create", "--body", "@" + path, "--offline", "--json", *more)
        return ran.json

    def test_what_the_checks_refuse_is_parked_with_all_problems(self):
        """Control: checks before the queue, and nothing is stored."""
        phase = {"name": "p", "outcome": "PAS", "started_at": END, "ended_at": BEGIN}
        text = json.dumps(dict(BODY, phases=[phase], outcome="GOOD")).encode()
        document = self.store_body(text)
        problems = document.pop("problems")
        entry, = self.sql("SELECT * FROM entry")
        self.assertEqual(document, {
            "id": None,
            "queued": True,
            "client_run_ref": entry["ref"],
            "state": "parked"})
        for part in "outcome", r"phases\[0\].outcome", r"phases\[0\].ended_at":
            self.assertRegex("\n".join(problems), part)
            self.assertRegex(entry["error"], part)
        self.assertEqual(entry["state"], "parked")
        self.assertEqual(entry["exit_code"], 5)
        answer = self.fails(5, "create", "--body", "@body.json", "--offline", "-q")
        self.assertEqual(answer.out, "")
        ran = self.fails(5, "create", "--body", "@body.json", "--offline")
        ref = entry["ref"][:12]
        self.assertIn(f"Parked {ref} in {self.path}", ran.out)
        self.assertIn(f"queue fix {ref}", ran.err)
        self.has(parked=1)

    def test_a_create_that_is_refused_goes_on_sending_what_is_right(self):
        self.offline("A")
        self.create("B", "--phases", '[{"name": "p"}]', status=5)
        self.create("C")
        self.intact("A", "C")

    def test_odd_numbers_and_times_are_stored_as_they_were_written(self):
        body = dict(BODY, metadata={"x": float("nan")})
        document = self.store_body(json.dumps(body).encode())
        self.assertIn("metadata.x", "".join(document["problems"]))
        request = self.ok("queue", "get", document["client_run_ref"][:9], "--json").json
        self.assertEqual(request["metadata"], {"x": "NaN"})
        document = self.store_body(json.dumps(dict(BODY, ended_at="yesterday-ish")).encode())
        request = self.ok("queue", "get", document["client_run_ref"][:9], "--json").json
        self.assertEqual(request["ended_at"], "yesterday-ish")
        without = {name: value for name, value in BODY.items() if name != "serial_number"}
        document = self.store_body(json.dumps(without).encode())
        self.assertIn("serial", "".join(document["problems"]))
        ran = self.ok("queue", "ls")
        self.assertIn("parked", ran.out)

    def test_what_is_no_request_at_all_is_exit_2_and_not_stored(self):
        for text in (b"{", b"[1]", b'{"outcome":"PASS","outcome":"FAIL"}', b'{"metadata":{}}'):
            path = self.file("body.json", text)
            self.fails(2, "create", "--body", "@" + path, "--offline")
        self.keep("A", "--sirial", "x", status=2)
        self.fails(2, *UNIT, "--started-at", "now", "--ended-at", END, "--offline")
        self.assertFalse(os.path.exists(self.path))

    def test_a_file_that_cannot_be_read_is_left_out_and_the_run_goes(self):
        """Control: open_files that raises, and the run is lost."""
        os.mkdir("folder")
        words = create("A", "--json", "--attach", "folder", "missing.txt", self.file("a.txt"))
        document = self.fails(5, *words).json
        self.assertEqual(len(document["problems"]), 2)
        self.assertIsNotNone(document["id"])
        self.intact(A={"a.txt": b"content\n"})
        ran = self.keep("B", "--attach", "missing.txt", status=5)
        self.assertRegex(ran.err, "missing.txt was left out.*\nFix: the same command again")
        self.assertEqual(self.entry("B")["state"], "waiting")

    def test_queue_ls_names_the_files_that_were_left_out_until_they_are_there(self):
        """Control: tell them once, when nobody looks."""
        words = ("B", "--attach", "foto.png", "missing.txt")
        self.keep(*words, status=5)
        self.when("B", "status", status=500)
        self.inside("queue", "send")
        self.calm()
        row, = self.ok("queue", "ls", "--json").json["data"]
        self.assertRegex(row["error"], "^without foto.png, missing.txt; the server answered 500")
        self.assertIn("without foto.png", self.ok("queue", "get", row["client_run_ref"]).out)
        self.file("foto.png")
        self.file("missing.txt")
        self.keep(*words)
        row, = self.ok("queue", "ls", "--json").json["data"]
        self.assertRegex(row["error"], "^the server answered 500")
        runs.store(dict(BODY, serial_number="C"), ["none.log"])
        self.assertIn("without none.log", self.ok("queue", "ls").out)
        ran = self.send()
        self.assertRegex(ran.out, "sent C PASS as run .*, without none.log")

    def test_a_file_that_was_left_out_is_named_after_a_fix_of_something_else(self):
        """Control: keep the names that are left out now alone."""
        self.keep("A", "--attach", "none.log", "foto.png", status=5)
        self.ok("queue", "fix", self.ref("A"), "--docstring", "x", "--attach", self.file("b.txt"))
        self.assertIn("without none.log, foto.png", self.ok("queue", "ls").out)
        self.ok("queue", "fix", self.ref("A"), "--attach", self.file("none.log"))
        self.assertRegex(self.ok("queue", "ls").out, "without foto.png\n")

    def test_a_log_that_grows_goes_up_with_the_bytes_it_had(self):
        for serial, size in (("small", 1000), ("large", 3 << 20)):
            path = self.file("log.txt", b"x" * size)

            def grow(files, path=path, real=runs.open_files):
                opened = real(files)
                with open(path, "ab") as log:
                    log.write(b"a new line\n")
                return opened
            with patch("open_files", grow):
                self.keep(serial, "--attach", path)
        self.delivered(small={"log.txt": b"x" * 1000}, large={"log.txt": b"x" * (3 << 20)})

    def test_a_file_that_shrinks_while_it_is_copied_is_left_out(self):
        """What was copied of it is free again. Control: without leave_out() nothing is stored."""
        for serial, size in (("small", 1000), ("large", 3 << 20)):
            path = self.file("log.txt", b"x" * size)

            def shrink(files, path=path, real=runs.open_files):
                opened = real(files)
                os.truncate(path, 10)
                return opened
            with patch("open_files", shrink):
                ran = self.keep(serial, "--attach", path, self.attach[2], status=5)
            self.assertIn("log.txt was left out", ran.err)
        self.assertEqual(self.sql("SELECT name FROM file"), [{"name": "b.txt"}] * 2)
        self.assertEqual(self.count("chunk"), 2)
        self.delivered(small={"b.txt": b"b"}, large={"b.txt": b"b"})

    def test_store_takes_objects_and_never_raises_for_content(self):
        when = datetime.datetime(2026, 5, 19, 8, tzinfo=datetime.timezone.utc)
        body = dict(BODY, started_at=when, ended_at=when + datetime.timedelta(seconds=42))
        stored = runs.store(body, [("a.bin", b"\0\1")], queue=self.path)
        self.assertEqual(stored["state"], "waiting")
        self.assertEqual(stored["problems"], [])
        self.delivered(**{"SN-0001": {"a.bin": b"\0\1"}})
        loop = {}
        loop["loop"] = loop
        for odd in ({"x": object()}, {"x": float("nan")}, {"x": {1, 2}}, loop, {3: "y"},
                    {"x": b"bytes"}, {"x": "\ud800"}):
            stored = runs.store(dict(BODY, serial_number="ODD", metadata=odd), queue=self.path)
            json.loads(self.sql("SELECT body FROM entry WHERE ref = ?",
                                stored["client_run_ref"])[0]["body"])
        self.assertEqual(runs.store({}, queue=self.path)["state"], "parked")
        stored = runs.store(body_of("F"), ["missing.txt"], queue=self.path)
        self.assertEqual(stored["state"], "waiting")
        self.assertEqual(len(stored["problems"]), 1)
        with self.assertRaises(runs.BadInput):
            runs.store([], queue=self.path)
        with self.assertRaises(runs.Unavailable):
            runs.store(BODY, queue=self.at("missing", "q"))


    def test_a_date_that_is_none_is_told_with_a_ref_of_ones_own_too(self):
        """Control: without the suppress in read_relative_times it is a bug, and not stored."""
        words = ["--outcome", "PASS", "--procedure-id", "p", "--serial-number", "A",
                 "--started-at", "2026-13-45", "--ended-at", END, "--client-run-ref", "R"]
        ran = self.fails(5, "create", *words, "--offline")
        self.assertIn("Parked R", ran.out)
        self.nameless("TOFUPILOT_QUEUE")
        ran = self.fails(2, "create", *words)
        self.assertIn("--started-at", ran.err)

    def test_a_nan_that_was_stored_as_text_goes_out_for_its_ref_alone(self):
        """Control: without lost_numbers a retry or a fix of something else sends the text."""
        body = json.dumps(body_with({"measured_value": math.nan}))
        self.fails(5, "create", "--body", body, "--offline")
        self.send(5)
        self.retry(5)
        ref = self.sql("SELECT ref FROM entry")[0]["ref"]
        ran = self.fails(5, "queue", "fix", ref, "--docstring", "x")
        self.assertIn(MEASUREMENT_PATH + ".measured_value: NaN is not valid JSON", ran.err)
        self.assertEqual(self.posts(), [])
        ref = self.sql("SELECT ref FROM entry WHERE state = 'parked'")[0]["ref"]
        self.retry(0, ref)
        self.assertEqual(len(self.posts()), 1)

    def test_a_text_that_is_nan_stays_in_a_run_that_the_server_refused(self):
        """Control: lost_numbers for entries that were tried too; retry leaves it, and says nothing.
        """
        self.keep("A", "--set", "reading=NaN")
        self.when("A", "status", status=422)
        self.send(5)
        self.calm()
        self.retry(0)
        self.has(sent=1)

    def test_a_problem_inside_json_is_corrected_with_a_file(self):
        """Control: name the flags of create for whatever is wrong."""
        body = json.dumps(body_with({"measured_value": math.nan}))
        err = self.fails(5, "create", "--body", body, "--offline").err
        self.assertRegex(err, "Fix: .* queue get [0-9a-f]+ --json --out run.json")
        self.assertRegex(err, "queue fix [0-9a-f]+ --body @run.json")
        self.assertRegex(err, "queue rm [0-9a-f]+\n")
        err = self.keep("A", "--part-number", "no part", status=5).err
        self.assertRegex(err, r"Fix: .* queue fix [0-9a-f]+ \[flags of create\]")

    def test_a_run_that_was_parked_and_is_on_the_server_is_already_there(self):
        """Control: created_lines that takes both times for granted."""
        words = ["create", "--serial-number", "A", "--started-at", BEGIN, "--queue", self.path]
        self.fails(5, *words)
        self.sql("UPDATE entry SET state = 'sent', run_id = 'r', origin = ?", self.box.url)
        ran = self.ok(*words)
        self.assertIn("Already there: run r", ran.out)

class Fixing(QueueCase):
    """queue fix: what surely is not on a server is corrected in place."""

    def parked(self, serial="A", *more):
        """A run that the server refused with 422. Returns its ref."""
        self.keep(serial, *more)
        self.when(serial, "status", status=422, body={"message": "no such part"})
        self.send(5)
        self.calm()
        return self.ref(serial)

    def test_a_reference_that_a_fix_set_free_is_another_runs(self):
        """Control: correction_of() without the content: B is told as queued, and is nowhere."""
        self.keep("A", "--client-run-ref", "R")
        self.ok("queue", "fix", "R", "--client-run-ref", "R2")
        self.keep("B", "--client-run-ref", "R")
        self.delivered("A", "B")

    def test_the_old_ref_of_a_corrected_run_leads_to_the_new_one(self):
        ref = self.parked()
        ran = self.ok("queue", "fix", ref, "--part-number", "PCB01")
        self.assertIn(f"(was {ref})", ran.out)
        for more in (), ("--json",):
            ran = self.fails(4, "queue", "get", ref, *more)
            self.assertIn(f"its REF is {self.listed()[0]['client_run_ref'][:12]} now", ran.err)

    def test_a_serial_number_in_place_of_a_ref_is_told_with_the_ref(self):
        ref = self.parked("SN-7")
        for command in (["get"], ["rm"], ["fix", "--outcome", "PASS"]):
            ran = self.fails(4, "queue", command[0], "SN-7", *command[1:])
            self.assertIn(f"SN-7 is the serial number of {ref}", ran.err)

    def test_the_log_names_the_command_that_corrects_a_refused_run(self):
        """Only where it can be corrected. Control: of each run that is parked."""
        self.offline("A")
        self.box.fault("drop-after", "POST /v2/runs")
        self.send(6)
        self.when("A", "status", status=422)
        for is_there in True, False:
            ran = self.retry(5)
            command = runs.queue_command("fix", self.ref("A"), queue=self.path)
            self.assertEqual(command in ran.out, not is_there)
            if is_there:
                self.ok("rm", *self.stored())

    def test_the_command_lines_of_a_hint_stand_on_lines_of_their_own(self):
        """Control: both in one note, which shows the end of the line as two characters."""
        phase = dict(phase_named("p"), outcome="DONE")
        ran = self.keep("A", "--phases", json.dumps([phase]), status=5)
        self.assertRegex(ran.err, r"\nFix: \S+ queue get .* run\.json\n  edit run\.json, then: ")

    def test_a_refused_run_is_corrected_and_sent_with_its_files(self):
        ref = self.parked("A", *self.attach)
        self.assertIn("no such part", self.listed()[0]["error"])
        changed = self.file("other/b.txt".replace("/", "-"), b"new b")
        os.mkdir("new")
        os.rename(changed, os.path.join("new", "b.txt"))
        ran = self.ok("queue", "fix", ref, "--part-number", "PCB01", "--attach",
                      os.path.join("new", "b.txt"), self.file("c.txt"), "--json")
        self.assertEqual(ran.json["state"], "waiting")
        self.assertNotEqual(ran.json["client_run_ref"][:12], ref)
        self.send()
        self.intact(A={"a.txt": self.files["a.txt"], "b.txt": b"new b", "c.txt": b"content\n"})
        run, = self.stored()
        unit = self.client().get(run)["unit"]
        self.assertEqual(unit["part"]["number"], "PCB01")

    def test_the_bad_create_repeated_is_not_stored_again(self):
        """Also where it was corrected twice. Control: no receipt of the old ref in correct()."""
        ref = self.parked()
        self.ok("queue", "fix", ref, "--outcome", "FAIL")
        self.offline("A")
        self.has(waiting=1, fixed=1)
        new = self.sql("SELECT ref FROM entry WHERE state = 'waiting'")[0]["ref"]
        self.ok("queue", "fix", new[:12], "--docstring", "again")
        ran = self.keep("A")
        self.assertIn("waiting", ran.out)
        self.has(waiting=1, fixed=2)
        self.send()
        document = self.create("A", "--json").json
        self.assertEqual([document["id"]], self.stored())

    def test_its_receipts_are_dropped_after_30_days(self):
        ref = self.parked()
        self.ok("queue", "fix", ref, "--outcome", "FAIL")
        self.send()
        for days, states in ((29, {"sent": 1, "fixed": 1}), (2, {})):
            self.sql("UPDATE entry SET ended_at = ended_at - ?", days * 86400)
            self.send()
            self.assertEqual(self.states(), states)

    def test_what_is_still_wrong_stays_parked_and_is_told(self):
        self.keep("A", outcome="PAS", status=5)
        ref = self.ref("A")
        ran = self.fails(5, "queue", "fix", ref, "--phases", '[{"name": "p"}]')
        self.assertRegex(ran.err, "outcome")
        ran = self.fails(5, "queue", "fix", self.parked_ref(), "--phases", "[]", "--attach",
                         "missing.txt", "--json")
        self.assertEqual(ran.json["state"], "parked")
        self.ok("queue", "fix", self.parked_ref(), "--outcome", "PASS")
        self.delivered("A")

    def parked_ref(self):
        return self.sql("SELECT ref FROM entry WHERE state = 'parked'")[0]["ref"][:12]

    def test_a_ref_given_by_hand_stays_and_a_body_replaces_all(self):
        self.keep("A", "--client-run-ref", "mine", outcome="PAS", status=5)
        request = json.dumps(body_of("B"))
        path = self.file("body.json", request.encode())
        self.ok("queue", "fix", "mine", "--body", "@" + path)
        entry, = self.sql("SELECT ref, state, serial_number, units FROM entry")
        self.assertEqual(entry, {
            "ref": "mine",
            "state": "waiting",
            "serial_number": "B",
            "units": '["b"]'})
        self.ok("queue", "fix", "mine", "--client-run-ref", "other")
        self.has(waiting=1, fixed=1)
        self.delivered("B")

    def test_what_may_be_on_a_server_is_not_changed(self):
        """Each refusal is exit 2, says what to do, and leaves the entry as it is.

        Control: require_correctable() without one of its conditions.
        """
        self.offline("new")
        answer = self.fails(2, "queue", "fix", self.ref("new"))
        self.assertIn("flags", answer.err)
        self.send()
        self.box.fault("status", "PATCH /v2/runs/{id}", status=400)
        self.create("half", *self.attach)
        self.box.fault("drop-after", "POST /v2/runs")
        self.create("unanswered")
        self.offline("moving")
        self.sql("UPDATE entry SET state = 'moving', target = 'x y', hop = 'h' "
                 "WHERE serial_number = 'moving'")
        before = self.sql("SELECT * FROM entry")
        for serial, hint in (("new", "update-metadata"), ("unanswered", "queue retry"),
                             ("half", "queue retry"), ("moving", "move")):
            ran = self.fails(2, "queue", "fix", self.ref(serial), "--outcome", "FAIL")
            self.assertIn(hint, ran.err)
        self.assertEqual(self.sql("SELECT * FROM entry"), before)

    def test_a_corrected_run_that_is_there_already_leaves_both(self):
        ref = self.parked()
        self.keep("A", outcome="FAIL")
        ran = self.fails(2, "queue", "fix", ref, "--outcome", "FAIL")
        self.assertIn("queue rm", ran.err)
        self.has(parked=1, waiting=1)

    def test_a_sender_that_is_at_the_entry_does_not_send_what_was_corrected(self):
        """The claim compares ref and content. Control: claim by the number alone."""
        self.offline("A")
        with runs.Queue(self.path) as queue:
            entry = queue.by_ref(self.entry("A")["ref"])
            self.ok("queue", "fix", entry["ref"], "--outcome", "FAIL")
            with self.assertRaises(runs.Removed):
                queue.claim(entry, self.box.url)
        self.assertIsNone(self.sql("SELECT tried_at FROM entry WHERE state = 'waiting'")[0][
            "tried_at"])

    def test_retry_sends_a_named_one_as_it_is_and_checks_the_others_again(self):
        self.keep("A", outcome="PAS", status=5)
        self.retry(5)
        self.assertEqual(self.posts(), [])
        self.has(parked=1)
        self.retry(5, self.ref("A"))
        self.assertEqual(self.posts(), ["A"])
        self.has(parked=1)
        self.sql("UPDATE entry SET body = replace(body, 'PAS', 'PASS'), content = ?",
                 runs.run_ref(body_of("A")))
        self.retry()
        self.intact("A")


    def test_refs_come_from_a_file_too_and_the_wrong_number_of_them_is_told(self):
        """Control: take the words as they are."""
        self.offline("A", "B", "C")
        self.file("refs", self.ok("queue", "ls", "-q").out.encode())
        ran = self.fails(2, "queue", "fix", "a", "b", "c", "--docstring", "x")
        self.assertIn("this command takes one REF; 3 are given", ran.err)
        self.assertIn("FILE is missing", self.fails(2, "queue", "move").err)
        self.ok("queue", "rm", "@refs")
        self.has()

    def test_the_ref_that_a_run_had_before_names_the_new_one(self):
        """Control: say that it is not in the queue any more, as of a receipt."""
        self.offline("A")
        old = self.entry("A")["ref"]
        self.ok("queue", "fix", old, "--docstring", "x")
        new = self.sql("SELECT ref FROM entry WHERE state = 'waiting'")[0]["ref"]
        ran = self.fails(2, "queue", "fix", old, "--docstring", "y")
        self.assertIn("has another REF now: " + new[:12], ran.err)


class ServersOfRuns(QueueCase):
    """An entry goes to the server that was named when it was stored, and to no other."""

    def setUp(self):
        super().setUp()
        self.other = self.another()
        self.key = {"TOFUPILOT_API_KEY": self.other.user_key}

    def test_a_run_stored_for_a_named_server_is_not_sent_to_the_cloud_by_cron(self):
        """Control: without the look at bound_server() it goes to the sender's server."""
        self.offline("A")
        self.nameless()
        ran = self.send(6)
        self.assertIn(f"1 run waiting for {self.box.url}: name it with --url", ran.out)
        answer = self.fails(6, "check", "--url", self.other.url)
        self.assertRegex(answer.out, "FAIL  queue .*" + self.box.url)
        self.assertEqual(self.posts(), [])
        self.send(0, "--url", self.box.url)
        self.intact("A")

    def test_each_other_server_is_told_once_however_many_wait_for_it(self):
        self.offline("A", "B")
        for serial in "CD":
            self.keep(serial, "--url", self.other.url)
        third = self.another()
        ran = self.do("queue", "send", box=third, status=6)
        self.assertEqual(re.findall(r"(\d runs) waiting for (\S+):", ran.out), [
            ("2 runs", self.box.url), ("2 runs", self.other.url)])
        ran = self.do("queue", "send", status=6)
        self.assertEqual(ran.out.count("waiting for"), 1)
        self.do("queue", "send", box=self.other)
        self.intact("A", "B")
        self.intact("C", "D", box=self.other)

    def test_a_run_that_was_begun_stays_with_its_server_and_says_so(self):
        self.box.fault("drop-before", "POST /v2/runs")
        self.create("A")
        ran = self.keep("A", "--url", self.other.url)
        self.assertIn(f"it was begun for {self.box.url} and goes there alone", ran.err)
        self.delivered("A")

    def test_a_run_that_gets_another_server_at_the_last_moment_goes_to_that_one(self):
        """Control: claim() without the server: it is told so, and sent to the first."""
        self.offline("A")
        send = runs.Lane.send

        def late(lane, entry):
            self.run_script(*create("A", "--offline", "--url", self.other.url), status=0)
            return send(lane, entry)
        with mock.patch.object(runs.Lane, "send", late):
            self.send()
        self.send_to(self.other)
        self.intact("A", box=self.other)
        self.assertEqual(self.posts(), [])

    def test_the_cloud_by_default_is_no_name_and_the_senders_server_is_taken(self):
        self.nameless()
        self.offline("A")
        self.assertIsNone(self.entry("A")["server"])
        self.send_to(self.other)
        self.intact("A", box=self.other)

    def test_names_are_compared_in_lower_case_and_without_the_default_port(self):
        for one, other in (("https://Line.Example:443/api/", "https://line.example"),
                           ("http://LOCALHOST:80", "http://localhost"),
                           ("http://[::1]:8787", "http://[::1]:8787/api")):
            self.assertEqual(runs.normal_url(one), runs.normal_url(other))
        self.assertNotEqual(runs.normal_url("https://a.example:444"),
                            runs.normal_url("https://a.example"))
        named = self.box.url.replace("127.0.0.1", "LOCALHOST") + "/api/"
        self.keep("A", "--url", named)
        self.send(0, "--url", named.lower())
        self.intact("A")

    def test_a_name_is_kept_and_not_judged(self):
        for number, name in enumerate(("http://line.example", "ftp://x", "nonsense")):
            ran = self.keep(f"A{number}", env={"TOFUPILOT_URL": name})
            self.assertIn("warning", ran.err)
            self.assertEqual(self.entry(f"A{number}")["server"], name)
        self.nameless()
        os.makedirs("home", exist_ok=True)
        path = self.file(os.path.join("home", "credentials.json"), b"{broken")
        answer = self.keep("B")
        self.assertIn("warning", answer.err)
        credentials = {"api_key": "k" * 20, "base_url": self.other.url}
        save(path, json.dumps(credentials).encode())
        self.offline("C")
        self.assertIsNone(self.entry("B")["server"])
        self.assertEqual(self.entry("C")["server"], self.other.url)

    def test_a_broken_login_at_a_create_with_a_queue_is_stored_and_exit_0(self):
        for serial, env in (("A", {"TOFUPILOT_URL": "nonsense"}), ("B", {"TOFUPILOT_API_KEY": ""})):
            said = self.create(serial, "--json", env=env).json
            self.assertIsNone(said["id"])
            self.assertTrue(said["queued"])
        self.has(waiting=2)

    def test_what_was_not_sent_is_not_bound(self):
        """Nobody answers at the first server. Control: origin set for every failure."""
        self.nameless()
        self.offline("A")
        self.send(6, "--url", CLOSED)
        entry = self.entry("A")
        self.assertIsNone(entry["tried_at"])
        self.assertIsNone(entry["origin"])
        self.assertEqual(entry["tries"], 1)
        self.retry(0, "--url", self.other.url, env=self.key)
        self.intact("A", box=self.other)

    def test_the_mark_is_committed_when_the_connection_stands_and_before_the_first_byte(self):
        """Control: a claim before the connect binds a run that never went out."""
        self.offline("A")
        seen = []

        def look(*_):
            seen.append(self.entry("A")["origin"])
        real = runs.Exchange.connect

        def connect(exchange, *more):
            if exchange.before_send:
                look()
            return real(exchange, *more)
        self.box.on_request = look
        with mock.patch.object(runs.Exchange, "connect", connect):
            self.send()
        self.assertEqual(seen[:2], [None, self.box.url])

    def test_retry_with_a_url_takes_what_never_went_out_and_only_that(self):
        """The variable does not; and a run that was begun elsewhere waits."""
        self.keep("A", "--url", CLOSED)
        self.retry(6)
        self.box.fault("drop-after", "POST /v2/runs")
        self.create("B")
        ran = self.retry(6, "--url", self.other.url, env=self.key)
        self.assertIn(f"waiting for {self.box.url}", ran.out)
        self.intact("A", box=self.other)
        self.delivered("B")

    def test_the_same_create_with_another_server_goes_there_and_says_so(self):
        self.keep("A", "--url", CLOSED)
        ran = self.create("A")
        self.assertIn("it was stored for " + CLOSED, ran.err)
        self.assertIn(f"goes to {self.box.url} now", ran.err)
        self.intact("A")
        self.box.fault("drop-after", "POST /v2/runs")
        self.create("B")
        self.keep("B", "--url", self.other.url)      # may be there already
        self.assertEqual(self.entry("B")["origin"], self.box.url)
        self.delivered("A", "B")
        self.assertEqual(on_server(self.other), {})

    def test_a_run_begun_elsewhere_waits_and_is_told_each_time(self):
        """Its first server may have it, whatever was named. Control: `server` without `origin`."""
        self.nameless()
        self.offline("A")
        self.box.fault("drop-after", "POST /v2/runs")
        self.send(6, "--url", self.box.url)
        for command in ("send", "retry"):
            ran = self.fails(6, "queue", command, "--url", self.other.url, env=self.key)
            self.assertIn("waiting for " + self.box.url, ran.out)
        self.assertEqual(on_server(self.other), {})
        self.retry(0, "--url", self.box.url)
        self.intact("A")


def answer_with(status, times=None):
    """The fault of an error of the API: (kind, options)."""
    return "status", {"status": status, "times": times}


def page_with(status, times=None):
    """The fault of a page that is not the API's, such as of a proxy."""
    return "status", {"status": status, "times": times, "body": b"<h1>no</h1>", "headers": HTML}


    def test_a_retry_that_is_refused_changes_nothing(self):
        """Control: write the server before the login is looked up."""
        self.offline("A")
        before = self.entry("A")
        self.retry(2, "--url", "htps://typo")
        self.assertEqual(self.entry("A"), before)

    def test_a_dry_run_leaves_out_what_is_for_another_server(self):
        """Control: show all that waits."""
        self.offline("A")
        ran = self.send(0, "--dry-run", "--url", "https://other.example")
        self.assertEqual(ran.out, "")
        self.assertIn("waits for " + self.box.url, ran.err)


class QueueAnswers(QueueCase):
    """The table of answers: what waits, what is parked, what ends the pass."""

    # (state, effect on the pass, is_suspect): (error, status, tries, least and most wait)
    JUDGED = {
        ("waiting", "end", False): (
            ("AccessDenied", None, 0, 0, 0),
            ("AccessDenied", 401, 0, 0, 0),
            ("Unavailable", 429, 2, 0, 60),
            ("Unavailable", 503, 0, 0, 15),
            ("FileFailed", 503, 0, 0, 15)),
        ("waiting", "count", False): (
            ("AccessDenied", 403, 9, 3600, 3600),),
        ("waiting", "count", True): (
            ("Unavailable", None, 5, 0, 480),
            ("Unavailable", 500, 30, 0, 3600),
            ("Unavailable", 502, 3, 0, 120),
            ("FileFailed", 500, 0, 0, 15),
            ("NotTheAPI", 200, 0, 0, 15),
            ("NotTheAPI", 302, 0, 0, 15),
            ("NotTheAPI", 403, 0, 0, 15),
            ("NotTheAPI", 404, 1, 0, 30)),
        ("waiting", "go on", False): (
            ("Unavailable", 408, 1, 0, 30),
            ("Unavailable", 425, 1, 0, 30),
            ("FileFailed", 403, 99, 0, 3600)),
        ("parked", "go on", False): (
            ("Refused", 409, 0, 0, 0),
            ("Refused", 413, 0, 0, 0),
            ("Refused", 422, 0, 0, 0),
            ("NotFound", 404, 0, 0, 0),
            ("Damaged", None, 0, 0, 0))}
    SUB_UNIT = "Sub-unit with serial number X does not exist."
    # error, status, tries, seconds since it was stored or None, reason, state, wait
    WAITING_FOR_UNITS = (
        ("NotFound", 404, 0, 0, "", "parked", 0),
        ("NotFound", 404, 0, None, SUB_UNIT, "parked", 0),
        ("Refused", 422, 0, 0, SUB_UNIT, "parked", 0),
        ("NotFound", 404, 0, 0, SUB_UNIT, "waiting", 900),
        ("Refused", 400, 99, 60, SUB_UNIT, "waiting", 900),
        ("Refused", 400, 2, 86400, SUB_UNIT, "waiting", 10800),
        ("Refused", 400, 99, 2 * 86400, SUB_UNIT, "waiting", 21600),
        ("Refused", 400, 9, 3 * 86400 + 1, SUB_UNIT, "parked", 0))

    def test_each_answer_has_its_state_its_wait_and_its_effect(self):
        for expected, rows in self.JUDGED.items():
            for kind, status, tries, least, most in rows:
                error = getattr(runs, kind)("the server said no", status=status)
                for _ in range(50):
                    verdict = runs.judge(error, tries)
                    state, wait, effect, is_suspect = verdict
                    self.assertEqual((state, effect, is_suspect), expected, error)
                    self.assertTrue(least <= wait <= most, verdict)

    def test_what_the_server_asks_for_is_the_least_wait(self):
        for status, asked, most in ((429, 100, 200), (503, 3600, 3600), (425, 5, 10)):
            error = runs.Unavailable("later", status=status)
            error.retry_after = asked
            for _ in range(50):
                verdict = runs.judge(error, 1)
                self.assertTrue(asked <= verdict.wait <= most, verdict)

    def test_a_pass_tries_each_entry_once_unless_retries_says_more(self):
        """Control: give each lane no retries whatever the flag says, or the default of 3."""
        for flags, posts in (([], 1), (["--retries", "1"], 2)):
            self.use(self.another(), f"retries-{posts}")
            self.store("A")
            self.box.fault("status", "POST /v2/runs", status=500, times=None)
            self.send(6, *flags)
            self.assertEqual(self.posts(), posts * ["A"])

    def test_more_lanes_open_with_an_answer_only(self):
        """Control: in finish(), without the return after Removed, four lanes open."""
        work = runs.SendPass(None, None)
        work.finish(None, {"id": 1}, runs.Removed())
        self.assertEqual((work.width, work.is_stopped), (1, False))

    def test_what_was_not_sent_ends_the_pass_and_storage_refusals_count_for_themselves(self):
        nothing_sent = runs.Unavailable("cannot reach it")
        nothing_sent.maybe_sent = False
        self.assertEqual(runs.judge(nothing_sent, 5), ("waiting", 0, "end", False))
        refused = runs.FileFailed("no", status=403)     # ten of its own kind, not of any
        for suspect, state in ((0, "waiting"), (8, "waiting"), (9, "parked")):
            self.assertEqual(runs.judge(refused, 99, None, suspect).state, state)

    def test_a_run_waits_72_hours_for_its_sub_units(self):
        for row in self.WAITING_FOR_UNITS:
            kind, status, tries, waited, reason, state, wait = row
            error = getattr(runs, kind)("no", status=status, issues=[reason])
            verdict = runs.judge(error, tries, waited)
            self.assertEqual(verdict.state, state, row)
            self.assertEqual(verdict.wait, wait, row)
            self.assertEqual(verdict.effect, "go on", row)

    def test_the_reason_of_an_entry_says_what_to_do(self):
        """As the error of a direct create does. Control: leave the hint out of reason_text."""
        for name, status, hint, usual in (
                ("not linked", 403, "linked to its station", "correct the data"),
                ("too large", 413, "send less in one run", "correct the data"),
                ("other data", 422, "the server answered 422", "correct the data"),
                ("overload", 429, "the server answered 429", "run the same command")):
            self.use(self.another(), name.replace(" ", "-"))
            self.store("A")
            self.box.fault("status", "POST /v2/runs", status=status)
            self.assertIn(hint, self.run_script("queue", "send").out, name)
            reason = self.entry("A")["error"]
            self.assertIn(hint, reason)
            self.assertNotIn(usual, reason)     # its state says that

    def test_an_entry_whose_checksum_is_no_text_any_more_is_parked(self):
        """Control: settle() without is_damaged compares it in vain: it waits for ever."""
        self.offline("A", "B")
        self.sql("UPDATE entry SET content = CAST(x'ff' AS TEXT) WHERE serial_number = 'A'")
        self.send(5)
        self.has(parked=1, sent=1)

    def test_the_facts_of_a_reason_stand_apart(self):
        """Control: join the text of the error by blanks."""
        error = runs.Unavailable("cannot reach it:\n  refused", "look\nthere")
        error.with_note("proxy: none")
        self.assertEqual(runs.reason_text(error),
                         "cannot reach it: refused; proxy: none; look; there")

    # the fault from the sixth of nine on: exit status, creates that arrive, sent, parked
    PASSES = {
        "401": (answer_with(401), 3, 6, 5, 0),
        "three 403": (answer_with(403), 3, 8, 5, 0),
        "one 403": (answer_with(403, 1), 3, 9, 8, 0),
        "one 500": (answer_with(500, 1), 6, 9, 8, 0),
        "two 500": (answer_with(500, 2), 6, 9, 7, 0),
        "three 502": (answer_with(502), 6, 8, 5, 0),
        "one 422": (answer_with(422, 1), 5, 9, 8, 1),
        "all 422": (answer_with(422), 5, 9, 5, 4),
        "all 408": (answer_with(408), 6, 9, 5, 0),
        "429": (answer_with(429, 1), 6, 6, 5, 0),
        "503": (answer_with(503, 1), 6, 6, 5, 0),
        "HTML 429": (page_with(429, 1), 6, 6, 5, 0),
        "HTML 413": (page_with(413, 1), 5, 9, 8, 1),
        "HTML 404": (page_with(404), 6, 8, 5, 0),
        "HTML 403": (page_with(403), 6, 8, 5, 0),
        "portal": (page_with(200), 6, 8, 5, 0),
        "one portal": (page_with(200, 1), 6, 9, 8, 0),
        "redirect": (("redirect", {"times": None}), 6, 8, 5, 0),
        "drop": (("drop-before", {"times": None}), 6, 9, 5, 0),     # once a dead kept connection
        "cut": (("cut", {"times": None}), 6, 8, 5, 0)}

    def test_a_pass_does_what_the_answer_asks_for(self):
        """What the server answers from the sixth entry on, and what becomes of all.

        Control: in finish(), failures that are not counted, or not forgotten after a success.
        """
        for name, row in self.PASSES.items():
            (kind, options), status, posts, sent, parked = row
            self.use(self.another(), name.replace(" ", "-"))
            for serial in serials(9):
                self.store(serial)
            self.box.fault(kind, "POST /v2/runs", skip=5, **options)
            with patch("MOST_LANES", 1):
                ran = self.send(status)
            arrived = self.posts()
            self.assertEqual(arrived[:6], serials(6), name)
            self.assertEqual(len(arrived), posts, name)
            self.assertIn(f"{sent} sent, {9 - sent - parked} waiting, {parked} parked",
                          ran.out, name)
            self.calm()
            self.sql("UPDATE entry SET state = 'waiting', next_try_at = 0 WHERE state = 'parked'")
            self.retry()
            self.intact(*serials(9))

    def test_failures_that_are_not_in_a_row_do_not_end_a_pass(self):
        """Control: a count that a success does not set back."""
        self.offline(*serials(12))
        self.box.fault("status", "POST /v2/runs", skip=5, times=2, status=500)
        self.box.fault("status", "POST /v2/runs", skip=6, times=2, status=500)
        with patch("MOST_LANES", 1):
            ran = self.send(6)
        self.assertIn("8 sent, 4 waiting", ran.out)
        self.delivered(*serials(12))

    def test_several_lanes_end_with_the_answer_that_ends_a_pass_too(self):
        """What is under way comes to its end; nothing new begins."""
        for name in "401", "three 502", "429":
            (kind, options), status = self.PASSES[name][:2]
            self.use(self.another(), name.replace(" ", "-"))
            for serial in serials(20):
                self.store(serial)
            self.box.fault(kind, "POST /v2/runs", skip=5, **options)
            self.send(status)
            self.assertLessEqual(len(self.posts()), 5 + 3 + 4 + 4, name)
            self.calm()
            self.retry()
            self.intact(*serials(20))

    def test_up_to_four_entries_are_under_way_once_an_answer_came(self):
        """Control: MOST_LANES 1 never fills the barrier."""
        self.offline(*serials(9))
        together = threading.Barrier(4)
        creates, under_way, most = [], set(), []

        def meet(record):
            if record.path != "/api/v2/runs":
                return
            creates.append(record)
            number = len(creates)
            under_way.add(number)
            most.append(len(under_way))
            if number > 1:
                together.wait(30)
            under_way.discard(number)
        self.box.on_request = meet
        self.do("queue", "send")
        self.assertEqual(most[0], 1)
        self.assertEqual(max(most), 4)
        self.assertEqual(len(creates), 9)
        self.assertLessEqual(self.box.connections, 4)

    def test_one_procedure_that_is_not_linked_stops_nobody(self):
        """Control: with "end" for a 403 nothing after it goes out."""
        self.env["TOFUPILOT_API_KEY"] = self.box.station_key
        for number in range(9):
            procedure = "proc_abc" if number != 2 else self.box.unlinked_procedure_id
            self.keep(f"S{number}", procedure=procedure)
        ran = self.do("queue", "send", status=3)
        self.assertIn("8 sent, 1 waiting, 0 parked", ran.out)
        entry = self.entry("S2")
        self.assertEqual(entry["next_try_at"] - entry["failed_at"], 3600)

    def test_a_proxy_that_does_not_like_one_run_stops_no_other(self):
        """The run that is too large is parked with its size. Control: "end" for such answers."""
        for number, (status, state) in enumerate(((413, "parked"), (403, "waiting"))):
            self.use(self.another(), f"q{status}")
            self.offline("A", "BAD", "C", "D")
            self.when("BAD", "status", status=status, body=b"<h1>no</h1>", headers=HTML)
            self.fails((5, 6)[number], "queue", "send")
            self.assertEqual(self.states(), {"sent": 3, state: 1})
            self.intact("A", "C", "D")
        self.use(self.another(), "size")
        self.keep("BIG", "--docstring", "x" * 5000)
        self.when("BIG", "status", status=413, body=b"<h1>no</h1>", headers=HTML)
        self.send(5)
        self.assertRegex(self.entry("BIG")["error"], r"413.*5\.\d KB")

    def test_ten_such_answers_while_others_are_sent_park_a_run(self):
        """Where nothing else is sent it may be the network: those are not counted.

        Control: count every failure, or never.
        """
        self.offline("BAD")
        self.when("BAD", "reset")
        for _ in range(11):
            self.due()
            self.send(6)
        page = {"status": 403, "body": b"<p>", "headers": HTML}
        for kind, options in (("reset", {}), ("status", page), ("status", {"status": 500})):
            self.when("BAD", kind, **options)
            for count in range(1, 11):
                self.assertEqual(self.entry("BAD")["state"], "waiting")
                self.due()
                runs.store(dict(BODY, docstring=str(count)), queue=self.path)
                ran = self.inside("queue", "send")
            self.assertEqual(ran.status, 5)
            self.assertEqual(self.entry("BAD")["state"], "parked")
            self.assertTrue(self.entry("BAD")["error"])
            self.calm()
            self.sql("DELETE FROM entry WHERE serial_number != 'BAD'")
            self.when("BAD", kind, **options)
            self.retry(6, self.ref("BAD"))     # begins to count anew
        self.calm()
        self.retry(0, self.ref("BAD"))
        self.assertEqual(len(on_server(self.box)["BAD"]), 1)

    def test_a_file_that_the_storage_finds_too_large_is_parked_with_its_size(self):
        too_large = b"<Error><Code>EntityTooLarge</Code></Error>"
        for status, body in ((413, b"<h1>no</h1>"), (400, too_large)):
            self.use(self.another(), f"q{status}")
            self.with_files("A")
            self.offline("B")
            self.box.fault("status", "PUT .*", times=None, status=status, body=body)
            self.send(5)
            self.has(parked=1, sent=1)
            self.assertRegex(self.entry("A")["error"], r"a\.txt.*KB")
            self.calm()
            self.retry(0, self.ref("A"))
            self.intact("B", A=self.files)

    def test_another_refusal_of_the_storage_gets_a_new_url_once_and_ten_tries(self):
        self.keep("A", self.attach[0], self.attach[2])
        self.offline("B")
        self.box.fault("status", "PUT .*", times=None, status=403, body=b"<Error/>")
        for number in range(10):
            self.box.requests.clear()
            self.assertEqual(self.entry("A")["state"], "waiting")
            self.due()
            ran = self.inside("queue", "send")
            self.assertEqual(len(self.sent("PUT")), 2)
        self.assertEqual(ran.status, 5)
        self.has(parked=1, sent=1)

    def test_uploads_that_the_server_forgot_go_up_again_once(self):
        """Control: without forgetting `done` in attach() the entry is parked for ever."""
        self.with_files("A")
        self.box.fault("status", "PATCH /v2/runs/{id}", status=503)
        self.send(6)
        self.box.store.transaction(self.box.store.db.execute, "DELETE FROM uploads")
        self.delivered(A=self.files)
        self.assertEqual(len(self.sent("PUT")), 4)
        self.with_files("B")
        self.box.fault("status", "PATCH /v2/runs/{id}", times=None, status=404,
                       body={"message": "Upload not found"})
        self.send(5)
        self.assertEqual(len(self.sent("PUT")), 4)
        self.assertEqual(self.entry("B")["state"], "parked")

    def test_an_entry_that_cannot_be_read_is_parked_and_the_others_go(self):
        """Nothing of it is sent. Control: intact_body() that does not compare."""
        damages = {
            "bit": "UPDATE entry SET body = replace(body, 'proc_abc', 'proc_abb') WHERE id = ?",
            "high bit": "UPDATE entry SET body = CAST(substr(CAST(body AS BLOB), 1, 30) || x'E9' "
                        "|| substr(CAST(body AS BLOB), 32) AS TEXT) WHERE id = ?",
            "cut": "UPDATE entry SET body = substr(body, 1, 50) WHERE id = ?",
            "empty": "UPDATE entry SET body = '' WHERE id = ?",
            "list": "UPDATE entry SET body = '[]' WHERE id = ?",
            "number": "UPDATE entry SET body = '3' WHERE id = ?",
            "blob": "UPDATE entry SET body = x'00ff' WHERE id = ?",
            "digest": "UPDATE entry SET content = 'x' WHERE id = ?",
            "chunk": "UPDATE chunk SET data = x'62' || substr(data, 2) WHERE part = 1 AND file IN "
                     "(SELECT id FROM file WHERE entry = ?)",
            "chunk type": "UPDATE chunk SET data = 'text' WHERE file IN "
                          "(SELECT id FROM file WHERE entry = ?)",
            "chunk gone": "DELETE FROM chunk WHERE part = 1 AND file IN "
                          "(SELECT id FROM file WHERE entry = ?)",
            "size": "UPDATE file SET size = 'many' WHERE entry = ?",
            "sha256": "UPDATE file SET sha256 = NULL WHERE entry = ?"}
        for name, statement in damages.items():
            name = name.replace(" ", "-")
            self.use(self.box, name)
            self.box.requests.clear()
            self.offline("before-" + name)
            self.with_files("BAD")
            self.offline("after-" + name)
            self.sql(statement, 2)
            ran = self.send(5)
            self.assertIn("2 sent, 0 waiting, 1 parked", ran.out, name)
            self.assertNotIn("BAD", self.posts(), name)
            self.assertEqual(self.sent("PUT"), [], name)
            with self.subTest(name):
                self.assertRegex(ran.out, "damaged|not whole", name)

    def test_odd_values_in_a_row_park_it_at_most(self):
        """Whatever is wrong with one entry, the others go."""
        odd = ("units = 'x'", "units = NULL", "units = '[[]]'", "tries = 'x'", "stored_at = 'x'",
               "stored_at = NULL", "failed_at = 'x'", "next_try_at = 'x'", "tried_at = 'x'",
               "origin = ''", "server = 'x'", "suspect = 'x'", "serial_number = NULL",
               "outcome = NULL", "error = x'00'", "left_out = x'00'")
        for number, change in enumerate(odd):
            self.use(self.box, f"q{number}")
            self.offline(f"a{number}", "BAD", f"b{number}")
            self.sql(f"UPDATE entry SET {change} WHERE id = 2")
            self.when("BAD", "status", status=500)
            self.inside("queue", "send")
            self.calm()
            with self.subTest(change):
                self.assertEqual([self.entry(f"{name}{number}")["state"] for name in "ab"],
                                 ["sent", "sent"])
                ran = self.inside("queue", "ls")
                self.assertIn(ran.status, (0, 6))

    def test_a_start_that_no_calendar_has_stops_nobody(self):
        """The look for a run of the year 1 raises OverflowError on an old server."""
        self.box.store.knows_ref = False
        body = dict(BODY, started_at="0001-01-01T00:00:00Z", ended_at="0001-01-01T00:00:42Z")
        runs.store(dict(body, serial_number="BAD"), queue=self.path)
        self.offline("A", "B")
        self.sql("UPDATE entry SET tried_at = 1, origin = ?, state = 'waiting' WHERE id = 1",
                 self.box.url)
        self.retry()
        self.intact("BAD", "A", "B")

    def test_a_machine_without_threads_parks_nothing(self):
        """A thread that cannot start says nothing of the run."""
        self.offline("A")
        with without_threads():
            self.inside("queue", "send")
        self.has(waiting=1)
        with patch("start_thread", side_effect=RuntimeError("no thread")):
            self.retry()
        self.intact("A")

    def test_retry_after_is_respected_by_the_next_pass(self):
        self.offline("A", "B")
        self.box.fault("status", "POST /v2/runs", status=429, headers={"Retry-After": "120"})
        self.do("queue", "send", status=6)
        entry = self.entry("A")
        wait = entry["next_try_at"] - entry["failed_at"]
        self.assertTrue(120 <= wait <= 240, wait)
        self.do("queue", "send")
        self.assertEqual(self.posts(), ["A", "B"])
        self.delivered("A", "B")

    def test_a_sub_unit_may_come_later_from_here(self):
        for number, first in enumerate(("sub-unit", "parent")):
            parent, sub = f"P{number}", f"U{number}"
            if first == "sub-unit":
                self.offline(sub)
                self.box.fault("status", "POST /v2/runs", status=500)
            self.keep(parent, "--sub-units", sub)
            self.offline(sub)
            self.inside("queue", "send")
            self.calm()
            self.inside("queue", "retry")
            self.retry()
            self.assertEqual(len(on_server(self.box)[parent]), 1, first)

    def test_a_sub_unit_may_come_from_another_station_for_three_days(self):
        self.keep("P", "--sub-units", "U")
        self.do("queue", "send", status=5)
        entry = self.entry("P")
        self.assertEqual(entry["next_try_at"] - entry["failed_at"], 900)
        self.assertIn("a sub-unit needs a run of its own first", entry["error"])
        self.create("U", env={"TOFUPILOT_QUEUE": "other.queue"})
        self.delivered("P", "U")
        self.keep("P4", "--sub-units", "never")
        self.sql("UPDATE entry SET stored_at = stored_at - 73 * 3600")
        self.send(5)
        self.assertEqual(self.states()["parked"], 1)

    def test_runs_of_one_unit_keep_their_order_and_parked_ones_block_nobody(self):
        """In several lanes too. Control: without the look at in_flight they overtake."""
        self.offline("first", "A", "B")
        self.keep("A", outcome="FAIL")
        self.keep("a", outcome="ERROR")
        self.when("A", "status", status=500)
        self.send(6)
        self.assertEqual(sorted(self.posts()), ["A", "B", "first"])
        self.calm()
        self.box.requests.clear()
        self.box.fault("status", "POST /v2/runs", status=422)
        self.retry(5)
        self.assertEqual(self.posts("outcome"), ["PASS", "FAIL", "ERROR"])

    def test_a_clock_that_jumps_never_makes_a_wait_longer_than_its_cap(self):
        """Control: a plain now >= next_try_at waits for a year after a jump of -1 y."""
        year, now = 365 * 86400, 1.7e9
        failed = {"failed_at": now, "next_try_at": now + 3600}
        for passed, due in ((0, False), (3601, True), (year, True), (-year, True), (-7200, True),
                            (-30, False)):
            found = runs.is_due(failed, now + passed)
            self.assertEqual(bool(found), due, passed)
        self.assertTrue(runs.is_due({"failed_at": None, "next_try_at": 0}, now))
        for number, jump in enumerate((-year, -7200, year)):
            self.offline(f"A{number}")
            self.box.fault("status", "POST /v2/runs", status=403)
            self.send(3)
            self.sql("UPDATE entry SET failed_at = failed_at - ?, next_try_at = next_try_at - ?, "
                     "stored_at = stored_at - ? WHERE state = 'waiting'", jump, jump, jump)
            self.send()
        self.intact("A0", "A1", "A2")


class CommandsBesideAPass(QueueCase):
    """Another command changes an entry while a pass is at work: as if one came after the other."""

    def during(self, name, action):
        """Calls action() once, right before the first call of a method of Queue by that name."""
        real = getattr(runs.Queue, name)
        calls = []

        def first_then(queue, *args, **more):
            calls.append(name)
            if len(calls) == 1:
                action()
            return real(queue, *args, **more)
        return patch_queue(name, first_then)

    def remove(self, serial):
        """As queue rm does, by another connection."""
        self.sql("DELETE FROM entry WHERE serial_number = ?", serial)

    def fix_while_out_of_reach(self, *flags, status):
        """A run that a pass cannot send is corrected right before the pass writes that down."""
        self.offline("A")
        ref = self.entry("A")["ref"]
        out_of_reach = runs.Unavailable("cannot reach it")
        out_of_reach.maybe_sent = False

        def correct():
            self.run_script("queue", "fix", ref, *flags, status=status)
        with mock.patch.object(runs.Client, "send_create", side_effect=out_of_reach):
            with self.during("settle", correct):
                self.send(status or 6)

    def test_an_entry_that_is_removed_before_its_first_byte_ends_no_pass(self):
        """Control: Removed as a plain Exception, which looks like a server out of reach."""
        self.offline("A", "B")
        with self.during("claim", lambda: self.remove("A")):
            self.send()
        self.intact("B")

    def test_an_entry_that_is_corrected_during_a_pass_is_not_told_as_damaged(self):
        """Control: intact_body that compares the new body with the content of the old row."""
        self.offline("A", "B")
        ref = self.entry("A")["ref"]

        def correct():
            self.run_script("queue", "fix", ref, "--serial-number", "C", status=0)
        with self.during("intact_body", correct):
            self.send()
        self.assertEqual(self.states(), {"waiting": 1, "sent": 1, "fixed": 1})
        self.delivered("B", "C")

    def test_what_a_pass_writes_does_not_undo_a_correction(self):
        """Control: settle() without the comparison of the content."""
        self.fix_while_out_of_reach("--ended-at", "2020-01-01T00:00:00Z", status=5)
        self.has(parked=1, fixed=1)

    def test_what_a_pass_writes_is_not_told_of_the_corrected_run(self):
        """Control: settle() that asks for the state alone."""
        self.fix_while_out_of_reach("--serial-number", "B", status=0)
        entry = self.entry("B")
        self.assertEqual((entry["tries"], entry["error"]), (0, None))

    def test_a_retry_does_not_make_a_receipt_wait_again(self):
        """Control: Queue.retry that changes the row whatever its state is by then."""
        self.keep("A", "--part-number", "no part", status=5)
        self.has(parked=1)

        def sent_meanwhile():
            self.sql("UPDATE entry SET state = 'sent', body = NULL, run_id = 'x'")
        real = runs.Queue.retry

        def retry(queue, number):
            sent_meanwhile()
            return real(queue, number)
        with mock.patch.object(runs.Queue, "retry", retry):
            self.retry(0, self.entry("A")["ref"])
        self.has(sent=1)

    def test_a_refusal_after_an_overload_can_be_corrected(self):
        """Control: keep tried_at where the server refuses, as if the run might be there."""
        self.offline("A")
        self.box.fault("status", "POST /v2/runs", status=503)
        self.send(6)
        self.box.fault("status", "POST /v2/runs", status=400)
        self.retry(5)
        self.ok("queue", "fix", self.entry("A")["ref"], "--serial-number", "B")
        self.delivered("B")

    def test_an_assembly_that_waits_for_a_sub_unit_lets_its_run_pass(self):
        """Control: block all units of an entry that is not due."""
        self.keep("ASSEMBLY", "--sub-units", "PART")
        self.send(5)
        self.keep("PART")
        self.send()
        self.assertEqual(self.posts()[-1], "PART")
        self.send()     # it is due now. Control: leave next_try_at as it was
        self.intact("PART", "ASSEMBLY")

    def test_a_fix_that_is_taken_back_keeps_the_run(self):
        """Control: refuse a ref that only a receipt of an earlier fix has."""
        self.keep("A", "--part-number", "P0")
        ref = self.entry("A")["ref"]
        self.ok("queue", "fix", ref, "--part-number", "P1")
        waiting, = [row for row in self.sql("SELECT ref FROM entry WHERE state = 'waiting'")]
        self.ok("queue", "fix", waiting["ref"], "--part-number", "P0")
        self.has(waiting=1, fixed=1)
        self.delivered("A")

    def test_the_create_of_a_corrected_run_that_was_removed_is_stored_again(self):
        """Control: answer from the receipt of a fix whose entry is gone."""
        self.keep("A", "--part-number", "P0")
        self.ok("queue", "fix", self.entry("A")["ref"], "--part-number", "P1")
        corrected, = self.sql("SELECT ref FROM entry WHERE state = 'waiting'")
        self.ok("queue", "rm", corrected["ref"])
        self.keep("A", "--part-number", "P0")
        self.has(waiting=1)

    def test_a_file_of_the_bad_create_goes_to_the_corrected_run(self):
        """Control: return for a corrected ref before files are looked at."""
        self.keep("A", "--part-number", "P0")
        self.ok("queue", "fix", self.entry("A")["ref"], "--part-number", "P1")
        self.ok(*create("A", "--part-number", "P0", "--offline", *self.attach))
        self.delivered(A=self.files)

    def test_a_storage_out_of_reach_stops_no_run_without_files(self):
        """Control: take a connection that the storage refuses for one of the API."""
        self.with_files("A")
        self.offline("B", "C")
        origin = self.box.store.origin
        self.box.store.origin = CLOSED
        self.send(6)
        self.assertEqual(sorted(self.posts()), ["A", "B", "C"])
        self.box.store.origin = origin
        self.delivered("B", "C", A=self.files)

    def test_a_damaged_file_is_not_laundered_by_a_move(self):
        """Control: store a new digest of what a move copies."""
        self.with_files("A")
        self.sql("UPDATE chunk SET data = CAST(x'00' || substr(data, 2) AS BLOB) WHERE part = 0")
        self.ok("queue", "move", "stick.queue")
        self.has(parked=1)

    def test_a_damaged_request_is_not_laundered_by_a_fix(self):
        """Control: correct whatever stands there and give it a new hash."""
        self.offline("A")
        self.sql("UPDATE entry SET body = replace(body, 'proc_abc', 'proc_abd')")
        ref = self.entry("A")["ref"]
        ran = self.fails(1, "queue", "fix", ref, "--part-number", "P1")
        self.assertIn("--body", ran.err)

    def test_brackets_without_end_in_a_damaged_request_stop_no_retry(self):
        """Control: passes_checks and request_of that know no RecursionError."""
        self.offline("A")
        self.offline("B")
        self.sql("UPDATE entry SET state = 'parked', body = ? WHERE serial_number = 'A'",
                 "[" * 200000)
        ref = self.entry("A")["ref"]
        self.retry(5)
        self.has(parked=1, sent=1)
        self.assertIn("is damaged", self.fails(1, "queue", "get", ref).err)

    def test_a_damaged_page_of_a_parked_run_stops_no_retry(self):
        """Control: passes_checks without its look for malformed pages: 6, and B is not sent."""
        runs.store(dict(BODY, serial_number="A", part_number="no part", docstring="x" * 300000))
        self.offline("B")
        with open(self.path, "rb") as file:
            data = file.read()
        size = self.sql("PRAGMA page_size")[0]["page_size"]
        pages = range(0, len(data), size)
        full = [at for at in pages if data[at + 4:at + size] == b"x" * (size - 4)]
        with open(self.path, "r+b") as file:
            file.seek(full[len(full) // 2])
            file.write(bytes([255] * 4))
        self.retry(5)
        self.has(parked=1, sent=1)

    def test_a_run_that_may_have_moved_is_not_removed(self):
        """Control: queue rm that takes entries in the state moving."""
        self.offline("A")
        self.sql("UPDATE entry SET state = 'moving', target = 'x /stick', hop = 'h'")
        self.fails(2, "queue", "rm", self.entry("A")["ref"], "--yes")
        self.has(moving=1)

    def test_a_key_that_would_be_cut_is_masked_before(self):
        """Control: mask a reason after it was cut."""
        line = b"X" * 156 + self.box.user_key.encode() + b"\r\n\r\n"
        self.box.fault("raw", data=line, times=None)
        ran = self.fails(6, "ls", *ONCE)
        self.assertNotIn(self.box.user_key[:30], ran.err)

    def test_a_pass_whose_queue_fails_waits_for_the_entries_under_way(self):
        """Control: leave the loop without the wait; another sender could send the same entry."""
        self.offline("A", "B")
        ends = []
        real = runs.SendPass.finish

        def finish(work, *args):
            ends.append(work)
            return real(work, *args)

        def broken(queue, where, *values):
            yield from list(real_entries(queue, where, *values))[:1]
            raise queue.unusable("the stick is gone")
        real_entries = runs.Queue.entries
        with mock.patch.object(runs.SendPass, "finish", finish):
            with patch_queue("entries", broken):
                self.send(6)
        self.assertEqual(len(ends), 1)
        self.intact("A")


class QueueLocks(QueueCase):
    """The locks hold whatever the name, the user, and the number of threads."""

    def refuses(self, path, said):
        """Asserts that a queue file is used by nobody: the run goes directly, or is NOT stored."""
        env = {"TOFUPILOT_QUEUE": path}
        ran = self.create("direct", env=env)
        self.assertIn("Created run", ran.out + ran.err)
        self.assertRegex(ran.err, "warning(.|\n)*" + said)
        ran = self.keep("A", env=env, status=6)
        self.assertRegex(ran.err, said + "(.|\n)*NOT stored")
        self.send(6, env=env)

    def test_a_file_that_another_process_makes_meanwhile_is_used_as_it_is(self):
        """Control, on an SQLite as old as 3.14: without the look at sqlite_master it fails."""
        real = runs.Queue.transaction
        others = []

        def transaction(queue):
            if not others:
                others.append(queue)
                self.do(*create("B", "--offline"))
            return real(queue)
        with patch_queue("transaction", transaction):
            self.offline("A")
        self.has(waiting=2)

    def test_a_second_opener_of_a_new_file_makes_it_as_the_first_would(self):
        """Control: set auto_vacuum only where no other thread has the file open."""
        save(self.path, b"")
        info = os.stat(self.path)
        opened = runs.queues_of_this_process()
        with mock.patch.dict(opened.counts, {(info.st_dev, info.st_ino): 1}):
            with runs.Queue(self.path) as queue:
                self.assertEqual(queue.sql("PRAGMA auto_vacuum")[0][0], 2)

    def test_a_queue_that_is_open_is_read_by_no_other_way(self):
        """Closing it would drop its locks. Control: without is_open_queue it is attached."""
        self.offline("A")
        with runs.Queue(self.path):
            with self.assertRaisesRegex(runs.BadInput, "a queue that is in use"):
                runs.LocalFile(self.path)
        stored = runs.store(body_of("B"), [self.path], queue=self.path)
        self.assertIn("left out", stored["problems"][0])

    @unittest.skipUnless(POSIX, "links need rights on Windows")
    def test_a_link_leads_to_the_same_lock(self):
        """Control: abspath in place of realpath."""
        self.offline("A")
        os.symlink(self.path, "link")
        with runs.Queue(self.path) as queue, queue.sender_lock() as is_alone:
            self.assertTrue(is_alone)
            ran = self.do("queue", "send", "--queue", "link")
            self.assertIn("another process", ran.err)
        ran = self.ok("queue", "ls", "--queue", "link")
        self.assertIn(self.at("link"), ran.err)
        self.assertFalse(os.path.exists("link.lock"))
        self.send(0, "--queue", "link")
        self.intact("A")

    @unittest.skipUnless(hasattr(os, "link"), "no hard links here")
    def test_a_file_with_a_second_name_is_not_used(self):
        """Control: without the look at st_nlink each name has a lock of its own."""
        self.offline("A")
        os.link(self.path, "other")
        before = content("other")
        self.refuses(self.at("other"), "hard link")
        self.assertEqual(content("other"), before)
        self.fails(6, "queue", "move", "stick")
        os.unlink("other")
        self.send()
        self.intact("direct", "A")

    def test_a_lock_file_that_cannot_be_written_is_an_error_that_names_its_owner(self):
        """On a read-only file SQLite takes BEGIN EXCLUSIVE for a read: two would send.

        Control: without os.access the pass goes on.
        """
        self.offline("A")
        real = os.access
        lock = self.path + ".lock"

        def access(path, mode, **more):
            return path != lock and real(path, mode, **more)
        for command in (["queue", "send"], ["queue", "move", "stick"]):
            with mock.patch.object(os, "access", access):
                ran = self.fails(6, *command)
            self.assertIn(lock, ran.err)
            self.assertIn(runs.owner_of(lock), ran.err)
        self.assertEqual(self.posts(), [])
        self.has(waiting=1)

    @unittest.skipUnless(POSIX, "modes and owners of files are of POSIX")
    def test_what_is_made_is_for_its_user_and_the_lock_file_for_those_of_the_queue(self):
        """Control: os.makedirs without a mode; a lock with the mode of any new file."""
        self.addCleanup(os.umask, os.umask(0))
        home = self.env["TOFUPILOT_HOME"]
        self.nameless("TOFUPILOT_QUEUE")
        self.keep("home")
        for path, mode in ((home, 0o700), (os.path.join(home, "runs.queue"), 0o600)):
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), mode)
        self.use(self.box)
        self.offline("A")
        os.chmod(self.path, 0o660)
        self.send()
        queue = os.stat(self.path)
        lock = os.stat(self.path + ".lock")
        self.assertEqual(lock.st_mode, queue.st_mode)
        self.assertEqual(lock.st_uid, queue.st_uid)
        self.assertEqual(lock.st_gid, queue.st_gid)

    @unittest.skipUnless(POSIX, "Windows does not replace an open file")
    def test_a_lock_file_that_was_replaced_meanwhile_is_no_lock(self):
        """Control: without samestat two hold a lock, each on a file of its own."""
        self.offline("A")
        self.send()
        with runs.Queue(self.path) as queue:
            def connect(path, real=queue.sqlite3.connect, **more):
                connection = real(path, **more)
                connection.execute("SELECT 1 FROM sqlite_master").fetchall()    # opens it
                os.replace(self.file("new", b""), self.path + ".lock")
                return connection
            queue.sqlite3 = SimpleNamespace(connect=connect, Error=sqlite3.Error,
                                            OperationalError=sqlite3.OperationalError)
            with self.assertRaises(runs.QueueUnusable), queue.sender_lock():
                pass

    def test_another_program_that_holds_the_file_is_named_as_the_reason(self):
        self.offline("A")
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as viewer:
            viewer.execute("BEGIN EXCLUSIVE")
            with patch("LOCK_WAIT", 0):
                ran = self.keep("B", status=6)
                self.assertRegex(ran.err, "another program has it open(.|\n)*NOT stored")
                answer = self.send(6)
                self.assertIn("another program", answer.err)
        self.send()
        self.intact("A")

    def test_a_python_without_sqlite3_sends_directly_and_check_says_why(self):
        self.offline("old")
        with mock.patch.dict(sys.modules, {"sqlite3": None}):
            self.refuses(self.path, "sqlite3")
            ran = self.fails(6, "check")
            self.assertRegex(ran.out, "FAIL  queue .*sqlite3")
        self.has(waiting=1)

    def test_the_journal_of_others_is_not_looked_at(self):
        """On Windows a look opens it, and what is deleted meanwhile is not gone.

        Control: look at the journal for each queue; of a crowd under Wine each third lost a run.
        """
        self.offline("A")
        seen = []
        real = os.path.exists

        def exists(path):
            seen.append(str(path))
            return real(path)
        with mock.patch.object(os.path, "exists", exists):
            self.keep("B")
            self.ok("queue", "ls")
            self.send()
        self.assertEqual([path for path in seen if path.endswith("-journal")], [])
        self.assertGreater(len(seen), 0)

    def test_a_process_never_opens_a_queue_file_a_second_time_but_through_sqlite(self):
        """Closing a second descriptor drops the locks of the whole process.

        Control: a look at the header at each Queue(), or a read of --attach before the check.
        """
        self.offline(*serials(6))
        state = os.stat(self.path)
        key = (state.st_dev, state.st_ino)
        seen = []

        def spy(real):
            def opened(path, *more, **options):
                if runs.open_queues.counts[key] and isinstance(path, str) and os.path.exists(path) \
                        and os.path.samefile(path, self.path):
                    seen.append(path)
                return real(path, *more, **options)
            return opened
        with mock.patch.object(os, "open", spy(os.open)), \
                mock.patch("builtins.open", spy(open)), runs.Queue(self.path):
            self.create("A", *self.attach)
            self.create("B", "--attach", self.path, status=2)
            self.fails(2, "queue", "ls", "--out", self.path)
            self.fails(2, "queue", "get", "x", "--out", self.path)
            threads = [runs.start_thread(runs.store, body_of(f"T{number}"))
                       for number in range(4)]
            for wait in threads:
                wait()
            self.send(0, "--json")
            self.ok("queue", "ls", "--sent")
            self.ok("queue", "move", "stick")
            self.ok("check")
        self.assertEqual(seen, [])
        self.assertEqual(runs.open_queues.counts[key], 0)
        self.has(sent=11)

    @unittest.skipUnless(sys.platform == "linux" or POSIX and os.geteuid(), "needs modes")
    def test_what_cannot_be_written_can_be_read(self):
        """A write-protected stick: ls, get and check, in a folder and of a file without rights."""
        self.with_files("A")
        os.chmod(self.path, 0o444)
        os.chmod(self.folder, 0o555)
        self.addCleanup(os.chmod, self.folder, 0o755)
        home = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, home)
        os.chmod(home, 0o777)
        ref = self.ref("A")
        before = content(self.path)

        no_rights = ""
        if os.geteuid() == 0:       # gives up what lets root write everywhere
            no_rights = ("import ctypes; "
                         "header = (ctypes.c_uint32 * 2)(0x20080522); "
                         "ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())")

        def run(*words, status=0):
            env = {"TOFUPILOT_HOME": os.path.join(home, "h")}
            return self.do(*words, status=status, env=env, patch=no_rights)
        listed = run("queue", "ls", "--json").json
        self.assertEqual(len(listed["data"]), 1)
        request = run("queue", "get", ref, "--json").json
        self.assertEqual(request["serial_number"], "A")
        run("queue", "get", ref, "--download", os.path.join(home, "d"))
        self.assertEqual(content(os.path.join(home, "d")), self.files)
        self.assertRegex(run("check").out, "ok    queue .*1 waiting")
        for words in (["queue", "send"], ["queue", "rm", ref],
                      ["queue", "fix", ref, "--outcome", "FAIL"], create("B", "--offline")):
            self.assertIn(self.path, run(*words, status=6).err)
        self.assertEqual(content(self.path), before)
        self.assertEqual(self.posts(), [])


OLD_SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA application_id = 1413894737;
PRAGMA user_version = 1;
CREATE TABLE identity (id TEXT);
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
CREATE TABLE chunk (file INTEGER, part INTEGER, data BLOB, PRIMARY KEY (file, part));
"""
OLD_COLUMNS = {
    "entry": {"id", "ref", "state", "body", "units", "outcome", "serial_number", "procedure_id",
              "stored_at", "tries", "tried_at", "failed_at", "next_try_at", "error", "exit_code",
              "content", "origin", "run_id", "target", "hop", "came", "ended_at"},
    "file": {"id", "entry", "name", "size", "sha256", "upload_id", "done"},
    "chunk": {"file", "part", "data"}, "identity": {"id"}}


class OlderQueues(QueueCase):
    """A queue file of version 1.0.0, in every state, is opened, corrected, sent and moved."""
    # The ref that 1.0.0 made of BODY with the serial PARKED.
    REF = "c317b6cf83cdc14bfecb9d14335a9e705633e23ff4fa21fb422bebb1643c996b"
    A, B = b"first\n", b"second\n"

    def setUp(self):
        super().setUp()
        self.now = time.time()
        self.make(self.path, "4d331fc50e5f60d9b272ea08053368f2")

    def make(self, path, identity):
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(OLD_SCHEMA)
        rows_of(path, "INSERT INTO identity VALUES (?)", identity)

    def insert(self, path, table, **values):
        names, marks_of = ", ".join(values), ", ".join("?" * len(values))
        rows_of(path, f"INSERT INTO {table} ({names}) VALUES ({marks_of})", *values.values())
        return rows_of(path, f"SELECT max(id) AS id FROM {table}")[0]["id"]

    def old(self, serial, state="waiting", path=None, files=(), **more):
        """An entry as 1.0.0 wrote it. `files`: (name, bytes, upload ID or None)."""
        path = path or self.path
        ref = runs.run_ref(body_of(serial))
        body = json.dumps(dict(body_of(serial), client_run_ref=ref))
        is_over = state in ("sent", "moved")
        values = {
            "ref": ref,
            "state": state,
            "body": body,
            "units": json.dumps([serial.lower()]),
            "outcome": "PASS",
            "serial_number": serial,
            "procedure_id": "proc_abc",
            "stored_at": self.now - 60,
            "content": ref}
        if is_over:
            values.update(body=None, ended_at=self.now - 30)
        values.update(more)
        number = self.insert(path, "entry", **values)
        for name, data, upload in files:
            digest = hashlib.sha256(data).hexdigest()
            file = self.insert(path, "file", entry=number, name=name, size=len(data),
                               sha256=digest, upload_id=upload, done=int(upload is not None))
            if not is_over:
                rows_of(path, "INSERT INTO chunk VALUES (?, 0, ?)", file, data)

    def begun(self, serial):
        """The columns of an entry that was sent without an answer."""
        return {
            "tried_at": self.now - 50,
            "failed_at": self.now - 50,
            "tries": 1,
            "next_try_at": self.now - 40,
            "origin": self.box.url,
            "exit_code": 6,
            "error": f"no answer for {serial}"}

    def uploaded(self, name, data):
        """The ID of an upload that no run has yet."""
        made = self.client().initialize(name)
        urlopen(WebRequest(made["upload_url"], data, {}, method="PUT")).close()
        self.client().finalize(made["id"])
        return made["id"]

    def fill(self):
        """A queue with an entry in each state."""
        self.old("WAITING", files=[("a.txt", self.A, None)])
        self.old("PARKED", "parked", tries=1, error="no such part", exit_code=5)
        self.old("BEGUN", **self.begun("BEGUN"))
        run_id = self.made(serial_number="HALF")
        done = self.uploaded("a.txt", self.A)
        self.old("HALF", run_id=run_id, **self.begun("HALF"),
                 files=[("a.txt", self.A, done), ("b.txt", self.B, None)])
        sent = self.made(serial_number="SENT")
        self.old("SENT", "sent", **dict(self.begun("SENT"), run_id=sent))
        self.old("MOVED", "moved", target="c0050c4f55186b46f9d07b59ee3f8a9e /stick", hop="h1")
        self.old("STORING", "storing", ref=None, body=None)

    def test_the_refs_are_those_that_version_1_0_0_made(self):
        self.assertEqual(runs.run_ref(body_of("PARKED")), self.REF)

    def test_all_that_waits_is_sent_and_receipts_answer(self):
        self.fill()
        before = self.sql("SELECT * FROM entry WHERE state = 'parked'")
        for serial, state in (("WAITING", "waiting"), ("PARKED", "parked"), ("SENT", "sent"),
                              ("MOVED", "moved")):
            ran = self.ok("queue", "get", self.ref(serial))
            self.assertIn(state, ran.out)
        self.send(5)
        self.intact("BEGUN", "SENT", WAITING={"a.txt": self.A},
                    HALF={"a.txt": self.A, "b.txt": self.B})
        self.assertEqual(len(self.sent("PUT")), 2)      # the third was up already
        self.has(sent=4, parked=1, moved=1)
        after, = self.sql("SELECT * FROM entry WHERE state = 'parked'")
        self.assertEqual(dict(after, **before[0]), after)
        for serial in "SENT", "BEGUN":
            ran = self.create(serial)
            self.assertIn("Already there", ran.out)
        ran = self.keep("MOVED")
        self.assertIn("moved", ran.out)

    def test_it_can_be_read_where_it_cannot_be_written(self):
        self.fill()
        with runs.Queue(self.path, read_only=True) as queue:
            found = {entry["serial_number"]: entry["server"] for entry in queue.entries("1")}
        self.assertEqual(len(found), 7)
        self.assertEqual(set(found.values()), {None})
        self.assertEqual({row["name"] for row in self.sql("PRAGMA table_info(entry)")},
                         OLD_COLUMNS["entry"])

    def test_a_parked_one_is_corrected(self):
        self.fill()
        self.ok("queue", "fix", self.REF[:9], "--part-number", "P")
        self.send()
        self.intact("BEGUN", "SENT", "PARKED", WAITING={"a.txt": self.A},
                    HALF={"a.txt": self.A, "b.txt": self.B})

    def test_all_that_waits_is_moved_with_its_progress(self):
        self.fill()
        self.ok("queue", "move", "stick")
        self.has(moved=4, parked=1, sent=1, storing=1)
        self.send(0, "--queue", "stick")
        self.intact("BEGUN", "SENT", WAITING={"a.txt": self.A},
                    HALF={"a.txt": self.A, "b.txt": self.B})

    def test_a_move_of_1_0_0_that_broke_off_is_finished(self):
        """One that had arrived, with its token in `came`, and one that had not."""
        stick = self.at("stick")
        identity = "c0050c4f55186b46f9d07b59ee3f8a9e"
        self.make(stick, identity)
        target = f"{identity} /media/stick"
        for serial in "ARRIVED", "NOT":
            self.old(serial, "moving", target=target, hop="hop-" + serial)
        self.old("ARRIVED", path=stick, came="hop-ARRIVED")
        self.send(0, "--queue", stick)
        self.ok("queue", "move", stick)
        self.has(moved=2)
        self.assertEqual(self.states(stick), {"sent": 1, "waiting": 1})
        self.send(0, "--queue", stick)
        self.intact("ARRIVED", "NOT")

    def test_an_older_script_finds_all_that_it_knows(self):
        """The columns of 1.0.0 are there with their meaning; what is new it can ignore.

        Control: a column renamed, a state that waits under another name, or user_version 2.
        """
        self.use(self.box, "new")
        self.create("B")
        self.with_files("A")
        self.keep("C", outcome="PAS", status=5)
        self.assertEqual(self.sql("PRAGMA user_version"), [{"user_version": 1}])
        for table, names in OLD_COLUMNS.items():
            there = {row["name"] for row in self.sql(f"PRAGMA table_info({table})")}
            self.assertLessEqual(names, there)
        new = [row for row in self.sql("PRAGMA table_info(entry)")
               if row["name"] not in OLD_COLUMNS["entry"]]
        self.assertFalse(any(row["notnull"] for row in new))
        entry = self.entry("A")
        self.assertEqual(entry["content"], entry["ref"])
        self.assertEqual(entry["state"], "waiting")
        self.assertEqual(entry["units"], '["a"]')
        self.assertEqual(entry["tries"], 0)
        self.assertEqual(entry["next_try_at"], 0)
        self.assertEqual({entry[name] for name in (
            "tried_at", "failed_at", "error", "origin", "run_id", "target", "hop", "came",
            "ended_at")}, {None})
        self.assertEqual(json.loads(entry["body"])["client_run_ref"], entry["ref"])
        for row in self.sql("SELECT * FROM file"):
            chunks = self.sql("SELECT data FROM chunk WHERE file = ? ORDER BY part", row["id"])
            data = b"".join(chunk["data"] for chunk in chunks)
            self.assertEqual(data, self.files[row["name"]])
            self.assertEqual(len(data), row["size"])
            self.assertEqual(hashlib.sha256(data).hexdigest(), row["sha256"])
            self.assertEqual(row["done"], 0)
            first = chunks[0]["data"]
            self.assertEqual(len(first), min(65536, row["size"]))
        sent = self.entry("B")
        self.assertEqual(sent["state"], "sent")
        self.assertEqual(sent["origin"], self.box.url)
        self.assertIsNone(sent["body"])
        self.assertEqual(self.entry("C")["state"], "parked")
        self.assertEqual(self.entry("C")["exit_code"], 5)

    def test_a_newer_version_is_refused_and_left_as_it_is(self):
        self.sql("PRAGMA user_version = 2")
        before = content(self.path)
        ran = self.send(6)
        self.assertIn("newer version", ran.err)
        ran = self.keep("A", status=6)
        self.assertIn("NOT stored", ran.err)
        self.assertEqual(content(self.path), before)


class PausedClock:
    """A clock for the script that moves by a step at each look; sleep() calls a function."""

    def __init__(self, step, on_sleep):
        self.step = step
        self.on_sleep = on_sleep
        self.now = 0.0

    def monotonic(self):
        self.now += self.step
        return self.now

    def time(self):
        return time.time()

    def sleep(self, seconds):
        self.on_sleep()


class StoringFiles(QueueCase):
    """An entry is whole in the file, or not there; others get their turn; room is free again."""
    SMALL = 1000

    def setUp(self):
        super().setUp()
        patched = mock.patch.multiple(runs, SMALL=self.SMALL, BLOCK=1 << 10)
        patched.start()
        self.addCleanup(patched.stop)

    def test_of_two_large_files_of_one_name_the_whole_one_stays(self):
        """The other becomes shorter. Control: drop by the name."""
        files = []
        for folder in ("a", "b"):
            os.mkdir(folder)
            save(os.path.join(folder, "x.log"), b"x" * 5000)
            files.append(runs.LocalFile(os.path.join(folder, "x.log")))
        save(os.path.join("b", "x.log"), b"x")
        with runs.Queue(self.path) as queue:
            stored = queue.store(body_of("A"), files)
            self.assertEqual(len(stored.left_out), 1)
            kept, = queue.files(stored.entry["id"])
            kept.require_intact()

    def test_a_copy_that_cannot_begin_leaves_no_lock(self):
        """Control: close the lock only where the entry was made."""
        with runs.Queue(self.path) as queue:
            full = queue.unusable("database or disk is full")
            with patch_queue("insert", side_effect=full):
                with self.assertRaises(runs.Unavailable) as raised:
                    queue.store(body_of("A"), [runs.MemoryFile("x", b"x" * 5000)])
            self.assertIs(raised.exception, full)
            lock = sqlite3.connect(self.path + ".storing", isolation_level=None, timeout=0)
            with contextlib.closing(lock):
                lock.execute("BEGIN EXCLUSIVE")

    def test_a_kill_at_any_statement_stores_all_or_nothing(self):
        """Control: without the state storing (or the transaction) half an entry can be sent."""
        files = {"small": b"s" * 900, "large": b"l" * 5000, "more": b"m" * 3000}
        self.store("A0", **files)
        for number in range(1, 999):
            serial = f"A{number}"
            with killed_at(number) as seen:
                self.store(serial, **files)
            rows = self.sql("SELECT (SELECT count(*) FROM file WHERE entry = entry.id) AS files "
                            "FROM entry WHERE state != 'storing'")
            whole = [{"files": 3}] * number
            self.assertIn(rows, (whole, whole + whole[:1]))
            self.store(serial, **files)
            self.has(waiting=number + 1)
            if seen[0] < number:
                break
        self.assertGreater(number, 20)
        for row in self.sql("SELECT id, size FROM file"):
            found = self.sql("SELECT sum(length(data)) AS size FROM chunk WHERE file = ?",
                             row["id"])
            self.assertEqual(found, [{"size": row["size"]}])
        self.assertEqual(self.count("file"), 3 * number + 3)

    def test_a_killed_process_leaves_all_or_nothing(self):
        """The same by the end of a process. What it had copied is free after the next command."""
        expected = {}

        def step(number):
            serial = f"A{number}"
            expected[serial] = self.files
            words = create(serial, "--offline", *self.attach)
            ran = self.do(*words, patch=small + KILL, n=number, status=None)
            self.ok(*words)
            return ran
        small = "runs.SMALL, runs.BLOCK = 1000, 1 << 10"
        self.until_done(step, 20, first=4, stride=9)
        self.has(waiting=len(expected))
        self.delivered(**expected)

    def test_while_a_large_file_is_copied_others_get_their_turn(self):
        """It pauses, and no transaction is open then. Control: without the pause nobody wins."""
        turns = []

        def small():
            with patch("LOCK_WAIT", 0):
                self.store(f"small{len(turns)}")
            turns.append(self.states())
        with patch("time", PausedClock(0.2, small)):
            self.store("large", big=b"x" * 100000)
        self.assertGreater(len(turns), 2)
        self.assertEqual(turns[0], {"storing": 1, "waiting": 1})
        self.has(waiting=len(turns) + 1)

    def sizes_of_commits(self, step):
        """Bytes of each transaction that stores a file, where a look at the clock takes `step`."""
        real = runs.Queue.sql
        sizes = []

        def sql(queue, statement, *values):
            if statement.startswith("BEGIN"):
                sizes.append(0)
            elif statement.startswith("INSERT INTO chunk"):
                sizes[-1] += len(values[2])
            return real(queue, statement, *values)
        with patch("time", PausedClock(step, lambda: None)), patch("SMALL", 8000), \
                patch("MOST_IN_ONE_COMMIT", 16000), patch_queue("sql", sql):
            self.store(f"at-{step}", big=b"x" * 100000)
        return [size for size in sizes if size]

    def test_transactions_are_short_on_a_slow_disk_and_bounded_on_a_quick_one(self):
        """Control: a limit that does not shrink, or has no bound."""
        for step in 1, 0.001:
            sizes = self.sizes_of_commits(step)
            if step == 1:       # each commit takes a second
                self.assertGreaterEqual(sizes[0], 8000)
                self.assertLessEqual(max(sizes[4:]), 1024)
            else:
                self.assertTrue(16000 <= max(sizes) <= 16000 + 1024, sizes)

    def test_the_room_of_a_create_that_was_killed_is_free_at_the_next_command(self):
        """Control: freed by the clock only."""
        self.offline("first")
        for number, command in enumerate((create("next", "--offline"), ["queue", "send"])):
            with killed_at(30):
                self.store("killed", big=b"x" * 400000)
            self.assertEqual(self.states().get("storing"), 1)
            self.assertGreater(os.path.getsize(self.path), 10000)
            self.ok(*command)
            self.assertNotIn("storing", self.states())
            self.assertEqual(self.count("chunk"), 0)
            self.assertEqual(self.sql("PRAGMA freelist_count"), [{"freelist_count": 0}])

    def test_the_room_of_a_create_that_failed_is_free_at_once(self):
        """A content of another run under the same reference; a disk that fills; a lost file."""
        self.keep("A", "--client-run-ref", "mine")
        path = self.file("big", b"x" * 400000)
        words = ["--offline", "--client-run-ref", "mine", "--attach", path]
        self.create("B", *words, status=2)
        real = runs.Stage.copy

        def fail(stage, file):
            real(stage, file)
            raise stage.queue.unusable("database or disk is full")
        with mock.patch.object(runs.Stage, "copy", fail):
            self.keep("C", "--attach", path, status=6)
        self.has(waiting=1)
        self.assertEqual(self.count("chunk"), 0)

    def test_a_rollback_that_fails_keeps_the_reason(self):
        real = runs.Queue.sql

        def sql(queue, statement, *values):
            if statement.startswith("INSERT INTO entry"):
                raise queue.unusable("database or disk is full")
            if statement == "ROLLBACK":
                raise queue.unusable("cannot rollback - no transaction is active")
            return real(queue, statement, *values)
        self.offline("A")
        with patch_queue("sql", sql):
            ran = self.keep("B", status=6)
            self.assertIn("disk is full", ran.err)

    def test_a_create_that_lives_keeps_what_it_has_copied_however_long_it_takes(self):
        """Control: without its lock, or by a clock, another create takes it for left behind."""
        seen = []

        def others():
            if not seen:
                self.sql("UPDATE entry SET stored_at = stored_at - 900000, ended_at = 1")
                self.run_script(*create("other", "--offline"), status=0)
                self.run_script("queue", "send", status=0)
                self.store("third")
            seen.append(self.states())
        with patch("time", PausedClock(0.2, others)):
            self.store("large", big=b"x" * 100000)
        self.assertEqual(seen[0], {"storing": 1, "sent": 1, "waiting": 1})
        self.delivered("other", "third", large={"big": b"x" * 100000})

    def test_two_creates_of_one_run_and_an_rm_at_once_are_as_one_after_the_other(self):
        """The second decides in its last transaction. Control: decided before, the file is gone."""
        self.store("A", big=b"x" * 9000)
        ref = self.entry("A")["ref"]
        real = runs.Stage.hash_large
        removed = []

        def hash_large(stage, entry):
            real(stage, entry)
            if not removed:     # it has seen the entry, and no transaction has begun
                self.assertFalse(stage.queue.connection.in_transaction)
                removed.append(self.ok("queue", "rm", ref))
        with mock.patch.object(runs.Stage, "hash_large", hash_large):
            self.store("A", big=b"x" * 9000)
        self.assertEqual(len(removed), 1)
        self.delivered(A={"big": b"x" * 9000})

    def test_a_run_that_is_removed_while_its_file_is_copied_again_is_whole(self):
        self.store("A")
        ref = self.entry("A")["ref"]
        turns = []

        def remove():
            if not turns:
                self.ok("queue", "rm", ref)
            turns.append(ref)
        with patch("time", PausedClock(0.2, remove)):
            self.store("A", big=b"x" * 90000)
        self.assertTrue(turns)
        self.delivered(A={"big": b"x" * 90000})

    def test_the_same_create_again_does_not_hold_the_lock_while_it_reads_a_large_file(self):
        """Its digest is known before. Control: sha256() in the transaction."""
        path = self.file("big", b"x" * 90000)
        words = create("A", "--offline", "--attach", path)
        self.ok(*words)
        real = runs.LocalFile.blocks
        locked = []

        def blocks(file):
            viewer = sqlite3.connect(self.path, isolation_level=None, timeout=0)
            with contextlib.closing(viewer):
                try:
                    viewer.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    locked.append(file.name)
            return real(file)
        with mock.patch.object(runs.LocalFile, "blocks", blocks):
            self.ok(*words)
        self.assertEqual(locked, [])

    def test_a_large_file_goes_through_and_its_room_comes_back(self):
        """Control: auto_vacuum 0."""
        self.store("small")
        before = os.path.getsize(self.path)
        self.store("A", big=b"y" * 5000000)
        self.assertGreater(os.path.getsize(self.path), 5000000)
        self.send()
        self.assertLess(os.path.getsize(self.path), before + (1 << 17))
        self.intact("small", A={"big": b"y" * 5000000})


class Moving(QueueCase):
    """queue move: a run is never sendable in two files, nor lost from both."""

    def setUp(self):
        super().setUp()
        self.stick = self.at("stick")
        self.third = self.at("third")

    def move(self, source, target, status=0):
        return self.fails(status, "queue", "move", target, "--queue", source)

    def fix(self, outcome, path):
        """Gives the one run that waits in a file another outcome."""
        row, = self.listed("--queue", path)
        self.ok("queue", "fix", row["client_run_ref"], "--outcome", outcome, "--queue", path)

    def module_move(self, source, target):
        """A move without a command around it; what it refuses changes nothing."""
        with contextlib.suppress(runs.Error), runs.Queue(source) as queue:
            runs.move(queue, target)

    def copies(self, ref, *paths):
        """In how many files a run can be sent, and in how many it is being moved."""
        found = collections.Counter()
        for path in paths:
            if os.path.exists(path) and self.sql("SELECT 1 FROM sqlite_master", path=path):
                for row in self.sql("SELECT state FROM entry WHERE ref = ?", ref, path=path):
                    found[row["state"]] += 1
        return found["waiting"], found["moving"]

    def test_runs_go_to_a_stick_and_on_and_back_and_never_twice(self):
        """Control: with `came` ignored, a run that comes back is refused by its own receipt."""
        words = self.with_files("A")
        stops = [self.path, self.stick, self.path, self.stick, self.third, self.path, self.third]
        for source, target in zip(stops, stops[1:]):
            ran = self.move(source, target)
            self.assertIn("only copy", ran.out)
            self.ok(*words, env={"TOFUPILOT_QUEUE": source})      # its receipt answers
            for path in set(stops):
                if os.path.exists(path):
                    is_there = bool(self.states(path).get("waiting"))
                    self.assertEqual(is_there, path == target)
            self.assertEqual(self.sql("PRAGMA auto_vacuum", path=target), [{"auto_vacuum": 2}])
        self.delivered(at=set(stops), how="send", A=self.files)

    def test_a_kill_at_any_statement_leaves_each_run_in_one_file(self):
        """After each kill a run is in one file at least, and can be sent from one at most.

        Control: a move without the mark (the state stays waiting) can be sent from both.
        """
        self.offline("A")
        self.with_files("B")
        template = content(self.path)
        refs = [row["ref"] for row in self.sql("SELECT ref FROM entry ORDER BY id")]
        for number in range(1, 999):
            save(self.path, template)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.stick)
            with killed_at(number) as seen:
                self.module_move(self.path, self.stick)
            for ref in refs:
                waiting, moving = self.copies(ref, self.path, self.stick)
                self.assertLessEqual(waiting, 1)
                self.assertGreaterEqual(waiting + moving, 1)
            self.move(self.path, self.stick)
            self.has(moved=2)
            self.assertEqual(self.states(self.stick), {"waiting": 2})
            if seen[0] < number:
                break
        self.assertGreater(number, 25)
        self.assertEqual(self.count("file", path=self.stick), 2)
        self.delivered("A", at=[self.path, self.stick], how="send", B=self.files)

    def test_a_killed_process_leaves_each_run_in_one_file(self):
        """The same by the end of a process, at some of its statements."""
        for number in (12, 20, 24, 28, 33):
            self.path = self.at(f"from{number}")
            self.stick = self.at(f"to{number}")
            self.env["TOFUPILOT_QUEUE"] = self.path
            self.with_files(f"A{number}")
            ref = self.entry(f"A{number}")["ref"]
            self.do("queue", "move", self.stick, patch=KILL, n=number, status=None)
            waiting, moving = self.copies(ref, self.path, self.stick)
            self.assertLessEqual(waiting, 1)
            self.assertGreaterEqual(waiting + moving, 1)
            self.move(self.path, self.stick)
            self.assertEqual(self.copies(ref, self.path, self.stick), (1, 0))

    def finish_moves(self, path):
        """Repeats the moves out of a file that broke off."""
        if os.path.exists(path):
            for row in self.sql("SELECT target FROM entry WHERE state = 'moving'", path=path):
                self.module_move(path, row["target"].partition(" ")[2])

    def test_moves_in_every_order_among_three_files_bring_a_run_once(self):
        """One move is killed at each statement, others go on, then it is repeated.

        Control: with `received` ignored (only `came`), the run waits in two files (L8).
        """
        self.offline("A")
        ref = self.entry("A")["ref"]
        template = content(self.path)
        files = self.path, self.stick, self.third
        orders = list(itertools.product(itertools.permutations(files, 2), repeat=2))
        chance = random.Random(1)
        for number, is_twin in itertools.product(range(10, 34, 2), (False, True)):
            for others in chance.sample(orders, 6):
                for path in files:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                save(self.path, template)
                if is_twin:     # the same create, stored in both
                    save(self.stick, template)
                    self.sql("UPDATE identity SET id = 'twin'", path=self.stick)
                with killed_at(number):
                    self.module_move(self.path, self.stick)
                for move in (*others, (self.path, self.stick)):
                    if os.path.exists(move[0]):
                        self.module_move(*move)
                for path in files * 2:
                    self.finish_moves(path)
                found = self.copies(ref, *files)
                story = (number, is_twin, others)
                self.assertEqual(found[1], 0, story)
                self.assertGreaterEqual(found[0], 1, story)
                if not is_twin:
                    self.assertEqual(found[0], 1, story)

    def test_a_twin_that_was_merged_does_not_come_a_second_time(self):
        """The same create in two files; the move is killed before its last commit, the stick goes
        on to the third file, then the first move is repeated (L8).
        """
        words = create("A", "--offline")
        for path in self.path, self.stick:
            self.ok(*words, "--queue", path)
        real = runs.Queue.make_receipt
        with patch_queue("make_receipt", side_effect=KilledHere):
            with self.assertRaises(KilledHere):
                self.module_move(self.path, self.stick)
        self.assertIs(runs.Queue.make_receipt, real)
        self.move(self.stick, self.third)
        self.move(self.path, self.stick)
        ref = self.entry("A")["ref"]
        self.assertEqual(self.copies(ref, self.path, self.stick, self.third), (1, 0))
        self.assertEqual(self.states(self.third), {"waiting": 1})

    def test_a_run_that_comes_back_before_its_move_is_finished_is_not_lost(self):
        """Killed between insert and receipt; the stick moves back; then the move is repeated."""
        self.with_files("A")
        with patch_queue("make_receipt", side_effect=KilledHere):
            with self.assertRaises(KilledHere):
                self.module_move(self.path, self.stick)
        self.has(moving=1)
        self.assertEqual(self.states(self.stick), {"waiting": 1})
        for source, target in 2 * [(self.stick, self.path), (self.path, self.stick)]:
            self.inside("queue", "move", target, "--queue", source)
        self.delivered(at=(self.path, self.stick), how="send", A=self.files)

    def test_parked_runs_stay_and_nothing_waiting_is_exit_0(self):
        self.offline("A", "B", "C")
        self.sql("UPDATE entry SET state = 'parked' WHERE serial_number = 'A'")
        self.move(self.path, self.stick)
        self.has(parked=1, moved=2)
        ran = self.move(self.path, self.stick)
        self.assertIn("Nothing", ran.out)
        self.move(self.path, self.path, status=2)
        self.retry(0, self.ref("A"))
        self.send(0, "--queue", self.stick)
        self.intact("A", "B", "C")

    def test_a_folder_gets_a_file_of_the_same_name(self):
        self.offline("A")
        os.mkdir("usb")
        ran = self.move(self.path, "usb")
        self.assertIn(self.at("usb", "line.queue"), ran.out)
        self.assertEqual(self.states(self.at("usb", "line.queue")), {"waiting": 1})

    def test_progress_comes_along(self):
        """The run is there and its files uploaded: the stick's sender links them, no more.

        Control: without the commit of upload IDs (QueuedFile.save) they are uploaded again.
        """
        self.with_files("A")
        self.box.fault("status", "PATCH /v2/runs/{id}")
        self.send(6)
        self.move(self.path, self.stick)
        self.box.requests.clear()
        self.delivered(at=[self.stick], A=self.files)
        for method, path, _, _ in self.sent("POST", "PUT"):
            self.assertTrue(path.endswith("finalize"), (method, path))

    def test_the_server_of_a_run_comes_along(self):
        self.keep("A", "--url", CLOSED)
        self.move(self.path, self.stick)
        ran = self.send(6, "--queue", self.stick)
        self.assertIn("waiting for " + CLOSED, ran.out)

    def test_a_move_is_finished_to_the_same_file_under_another_name_only(self):
        """Control: with the target known by its path a renamed stick is taken for another."""
        self.offline("A", "B")
        real = runs.Queue.make_receipt
        calls = []

        def make_receipt(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KilledHere
            return real(*args)
        with patch_queue("make_receipt", make_receipt):
            with self.assertRaises(KilledHere):
                self.module_move(self.path, self.stick)
        self.has(moved=1, moving=1)
        ran = self.move(self.path, self.third, status=2)
        self.assertIn(f"queue get REF --json --queue {self.path}", ran.err)
        answer = self.ok("queue", "ls")
        self.assertIn("1 moving", answer.err)
        answer = self.send(0, tty=True)
        self.assertIn("1 moving", answer.out)
        answer = self.fails(6, "check")
        self.assertRegex(answer.out, "FAIL  queue .* 1 moving")
        self.assertEqual(self.posts(), [])
        os.rename(self.stick, self.stick + "-renamed")
        self.move(self.path, self.stick + "-renamed")
        self.has(moved=2)
        self.delivered("A", "B", at=[self.stick + "-renamed"], how="send")

    def test_a_full_stick_leaves_the_rest_waiting_and_says_how_many_went(self):
        """Control: with its old receipt on the stick taken for the run, the run stays moving."""
        self.offline("A")
        self.move(self.path, self.stick)
        self.move(self.stick, self.path)
        real = runs.Queue.sql

        def sql(queue, statement, *values):
            if statement.startswith("INSERT INTO entry"):
                raise queue.unusable("database or disk is full")
            return real(queue, statement, *values)
        with patch_queue("sql", sql):
            ran = self.move(self.path, self.stick, status=6)
        self.assertIn("0 of 1 run moved", ran.err)
        self.has(waiting=1)
        self.assertEqual(self.states(self.stick), {"moved": 1})
        self.delivered("A")

    def test_a_sent_run_that_got_another_file_can_be_moved(self):
        """The first's bytes went with the receipt. Control: the run stays moving for ever."""
        self.create("A", self.attach[0], self.attach[1])
        self.with_files("A")
        ref = self.listed()[0]["client_run_ref"]
        ran = self.ok("queue", "get", ref, "--download", "d")
        self.assertIn("went up already", ran.err)
        self.assertEqual(os.listdir("d"), ["b.txt"])
        self.move(self.path, self.stick)
        self.keep("A", "--queue", self.stick, *self.attach)
        self.assertEqual([row["attachments"] for row in self.listed("--queue", self.stick)], [2])
        self.delivered(at=[self.stick], A=self.files)

    def test_files_for_a_run_that_has_gone_are_not_put_into_its_receipt(self):
        """Control: without the raise in merge() they are lost in silence."""
        self.offline("A")
        self.move(self.path, self.stick)
        ran = self.keep("A", *self.attach, status=6)
        self.assertRegex(ran.err, "gone to " + re.escape(self.stick) + "(.|\n)*NOT stored")
        self.assertEqual(self.sql("SELECT * FROM file"), [])

    def test_a_damaged_run_is_parked_here_and_the_others_move(self):
        self.with_files("A")
        self.offline("B")
        self.sql("UPDATE chunk SET data = 'text'")
        self.move(self.path, self.stick)
        self.has(parked=1, moved=1)
        self.assertEqual(self.states(self.stick), {"waiting": 1})

    def test_a_correction_that_was_undone_on_the_stick_comes_home(self):
        """Control: correction_of() without stored_at: both files have receipts, nobody the run."""
        self.offline("A")
        self.fix("FAIL", self.path)
        self.move(self.path, self.stick)
        self.fix("PASS", self.stick)
        self.move(self.stick, self.path)
        self.delivered("A")

    def test_a_run_that_its_target_has_for_another_server_stays_and_the_others_move(self):
        """Control: merged, the second server gets nothing; or one such run stops the move."""
        other = self.another()
        self.keep("A", "--queue", self.stick, "--url", other.url)
        self.offline("A", "B")
        ran = self.move(self.path, self.stick, 2)
        self.assertRegex(ran.err, f"waits there for {other.url}(.|\n)*1 of 2 runs moved")
        self.has(waiting=1, moved=1)
        self.send_to(other, 6, "--queue", self.stick)       # B is for the first
        self.intact("A", box=other)
        self.move(self.path, self.stick)
        self.delivered("A", "B", at=[self.stick])

    def test_a_copy_from_a_third_file_is_answered_by_the_correction_that_moved(self):
        """Control: any run that a move brings taken for the one whose correction was undone."""
        self.offline("A")
        self.keep("A", "--queue", self.third)
        self.fix("FAIL", self.path)
        self.move(self.path, self.stick)
        self.move(self.third, self.path)
        self.delivered("A", at=[self.path, self.stick])

    def test_an_undone_correction_comes_home_although_another_server_has_its_like(self):
        """Control: look at the state of the correction, not at when the run was stored."""
        other = self.another()
        self.offline("A")
        self.fix("FAIL", self.path)
        self.move(self.path, self.stick)
        self.create("A", "--offline", "--url", other.url, outcome="FAIL")
        self.fix("PASS", self.stick)
        self.move(self.stick, self.path)
        self.send_to(other, 6)
        self.send()
        self.intact("A")

    def test_files_of_a_run_whose_correction_was_sent_are_not_dropped_by_a_move(self):
        """Control: without the raise in add_to_corrected() exit 0, and they are nowhere."""
        self.keep("A", "--queue", self.stick)
        self.fix("FAIL", self.stick)
        self.ok("queue", "send", "--queue", self.stick)
        self.with_files("A")
        ran = self.move(self.path, self.stick, 2)
        self.assertIn("was corrected and is sent", ran.err)
        self.ok("queue", "get", self.ref("A"), "--download", "d")
        self.assertEqual(content(self.at("d")), self.files)

    def test_a_correction_for_one_server_does_not_answer_for_another(self):
        """Control: correction_of() without the look at the servers; by a move and by a create."""
        other = self.another()
        self.keep("A", "--queue", self.stick, "--url", other.url)
        self.fix("FAIL", self.stick)
        self.offline("A")
        ran = self.move(self.path, self.stick, 2)
        self.assertIn(f"goes to {other.url}", ran.err)
        self.has(waiting=1)
        self.keep("A", "--queue", self.stick, status=2)

    def test_a_correction_that_came_back_can_be_undone(self):
        """Control: rename() that knows the receipts of a fix alone calls it a double."""
        self.offline("A")
        self.move(self.path, self.stick)
        self.fix("FAIL", self.stick)
        self.move(self.stick, self.path)
        self.fix("PASS", self.path)
        self.delivered("A")

    def test_a_run_that_stays_keeps_the_younger_ones_of_its_unit(self):
        """Control: move them all the same, and they overtake it."""
        other = self.another()
        self.keep("A", "--queue", self.stick, "--url", other.url)
        self.offline("A")
        self.keep("A", outcome="FAIL")
        self.offline("B")
        ran = self.move(self.path, self.stick, 2)
        self.assertIn("1 of 3 runs moved", ran.err)
        self.has(waiting=2, moved=1)

    def test_a_create_for_another_server_amid_a_move_is_told(self):
        """Control: without the word about a run that is moving, exit 0 as if it went there."""
        self.offline("A")
        self.sql("UPDATE entry SET state = 'moving', target = 'x y'")
        ran = self.keep("A", "--url", self.another().url)
        self.assertIn(f"it was begun for {self.box.url} and goes there alone", ran.err)

    def test_the_receipt_of_a_move_does_not_answer_for_another_server(self):
        other = self.another()
        self.offline("A")
        self.move(self.path, self.stick)
        self.keep("A", "--url", other.url)
        self.send_to(other)
        self.intact("A", box=other)
        self.delivered("A", at=[self.stick])

    def test_rm_during_a_pass_takes_what_it_names_and_no_more(self):
        """Control: without the look for a body that is gone, exit 1 and the rest stays."""
        self.offline("A", "B", "C")
        ref = self.ref("B")

        def remove(record):
            if record.method == "POST":
                self.box.on_request = None
                self.run_script("queue", "rm", ref, status=0)
        self.box.on_request = remove
        self.do("queue", "send")
        self.assertEqual(sorted(self.posts()), ["A", "C"])
        self.has(sent=2)

    def test_rm_of_what_is_on_its_way_is_refused_until_it_is_known(self):
        """Control: without the look at tried_at it is removed, and sent all the same."""
        self.offline("A")
        ref = self.ref("A")
        seen = []

        def remove(record):
            if record.method == "POST":
                seen.append(self.run_script("queue", "rm", ref))
        self.box.on_request = remove
        self.do("queue", "send")
        self.assertEqual([ran.status for ran in seen], [6])
        self.assertIn("on its way", seen[0].err)
        self.intact("A")

    def test_a_killed_queue_is_fine_where_it_lies(self):
        """A journal is hot (killed amid a spilled transaction): opened in place it recovers."""
        self.offline("A")
        words = create("B", "--offline", "--attach", self.file("b", b"b" * 9000000))
        self.do(*words, n=90, status=KILL_STATUS, patch=AT_STATEMENT % """seen[0] == 5:
        real(self, "PRAGMA cache_size = 5")
    if seen[0] == n: os.kill(os.getpid(), 9)""")
        self.assertTrue(os.path.exists(self.path + "-journal"))
        self.move(self.path, self.stick)
        self.assertEqual(self.states(self.stick), {"waiting": 1})
        self.do(*words)
        self.do("queue", "send")
        self.intact(B={"b": b"b" * 9000000})


class ExactlyOnce(QueueCase):
    """A run is on the server once and with all its files, whatever is lost or killed."""

    def test_a_lost_answer_makes_no_second_run(self):
        """Control: where it does not look before it sends again, an old server gets it twice."""
        expected = {}
        faults = (("drop-after", {}), ("reset", {"after": True}), ("cut", {}),
                  ("slow", {"delay": 9}))
        for (kind, options), more in itertools.product(faults, ([], ["--offline"])):
            serial = kind + "".join(more)
            expected[serial] = self.files
            self.box.fault(kind, "POST /v2/runs", **options)
            self.do(*create(serial, "--timeout", "0.2", *more, *self.attach))
            self.do("queue", "send", "--timeout", "0.2", status=None)
            self.calm()
            self.retry()
        self.intact(**expected)
        self.box.fault("drop-after", "POST /v2/runs")
        self.do(*create("control"), patch=NO_LOOK)
        self.do("queue", "retry", patch=NO_LOOK)
        count = 1 if self.box.store.knows_ref else 2
        self.assertEqual(len(on_server(self.box)["control"]), count)

    def test_twins_are_two_runs_and_stay_two(self):
        """Control: an is_same_run that compares less (not metadata, say) adopts the other one."""
        twins = (["--set", "x=1"], ["--set", "x=2"], [], ["--docstring", "d"],
                 ["--operated-by", "Eve"])
        for number, more in enumerate(twins, 1):
            self.box.fault("drop-after", "POST /v2/runs")
            self.keep("A", *more)
            self.send(6)
            self.retry()
            self.assertEqual(len(on_server(self.box)["A"]), number)
        self.box.fault("drop-before", "POST /v2/runs")
        self.create("A", "--set", "x=3")
        with patch("is_same_run", lambda row, body: True):
            self.retry()
        self.assertEqual(len(on_server(self.box)["A"]), 6)   # those of other entries are known

    def test_the_same_times_with_another_value_are_another_run(self):
        """The second fails without an answer; the row shows no measurement (L5).

        Control: a look before the POST that takes the first run for it.
        """
        for value in 1.0, 2.0:
            phase = {
                "name": "p",
                "outcome": "PASS",
                "started_at": BEGIN,
                "ended_at": END,
                "measurements": [{"name": "m", "outcome": "PASS", "measured_value": value}]}
            if value == 2.0:
                self.box.fault("drop-before", "POST /v2/runs")
            self.inside(*create("A", "--phases", json.dumps([phase])))
        self.retry()
        self.assertEqual(len(on_server(self.box)["A"]), 2)

    def test_a_twin_is_not_adopted_when_a_kept_connection_is_dead(self):
        """Control: with the runs of other entries unknown, the second run is lost.

        An old server shows no phases in a row, so these two differ in nothing that a look sees.
        """
        self.use(self.another(knows_ref=False), "twins")
        for name in ("one", "two"):
            self.keep("A", "--phases", json.dumps([phase_named(name)]))
        self.box.fault("drop-before", "POST /v2/runs", skip=1)
        self.send()
        self.assertEqual(len(on_server(self.box)["A"]), 2)

    def refusals_of_a_second_try(self):
        """(kind, options) of faults: a proxy's page, and the API's own words."""
        return (("too_large", {"limit": 10}),
                ("status", {"status": 422}),
                ("status", {"status": 404}))

    def test_a_refusal_tells_nothing_of_an_earlier_try_that_may_have_arrived(self):
        """Control: without the look after it queue fix makes a second run of the first.

        An old server is looked at before the second try, and then not asked again.
        """
        serials = []
        for number, (kind, options) in enumerate(self.refusals_of_a_second_try()):
            for fault, is_there in (("drop-after", True), ("drop-before", False)):
                serial = f"{fault}-{number}"
                serials.append(serial)
                self.offline(serial)
                self.box.fault(fault, "POST /v2/runs")
                self.send(6)
                self.box.fault(kind, "POST /v2/runs", **options)
                is_found = is_there and not self.box.store.knows_ref
                self.retry(0 if is_found else 5)
                fixing = ("queue", "fix", self.ref(serial), "--set", "fixed=1")
                self.fails(2 if is_there else 0, *fixing)
                self.delivered(*serials)

    def test_the_same_within_one_command(self):
        """Control: without the look it ends with no word of the run that is there."""
        self.nameless("TOFUPILOT_QUEUE")
        for number, (kind, options) in enumerate(self.refusals_of_a_second_try()):
            serial = f"A{number}"
            self.calm()
            self.box.fault("drop-after", "POST /v2/runs")
            self.box.fault(kind, "POST /v2/runs", **options)
            if self.box.store.knows_ref:
                is_404 = options.get("status") == 404
                ran = self.create(serial, status=4 if is_404 else 5)
                self.assertIn(f"is there: {self.stored()[-1]}", ran.err)
                self.calm()
            self.create(serial)
        self.intact("A0", "A1", "A2")

    def test_a_refused_run_is_not_taken_for_its_twin(self):
        """A row shows no phases. Control: the run that the look finds taken for this one."""
        self.use(self.another(), "twins")
        self.create("A", "--phases", json.dumps([phase_named("one")]), env=NO_QUEUE)
        more = ("--phases", json.dumps([phase_named("two")]))
        self.keep("A", *more)
        self.box.fault("drop-before", "POST /v2/runs")
        self.send(6)
        self.box.fault("status", "POST /v2/runs", status=422)
        ran = self.retry(5)
        self.assertIn(self.stored()[0], ran.out)
        self.retry()
        self.assertEqual(len(on_server(self.box)["A"]), 2)

    def test_a_run_that_somebody_changed_meanwhile_is_found_after_a_refusal(self):
        """Control: is_same_run, which compares the metadata too, in doubt_refusal()."""
        self.offline("A")
        self.box.fault("drop-after", "POST /v2/runs")
        self.send(6)
        self.ok("update-metadata", self.stored()[0], "--set", "x=1")
        self.box.fault("too_large", "POST /v2/runs", limit=10)
        self.retry(5)
        ran = self.fails(2, "queue", "fix", self.ref("A"), "--set", "fixed=1")
        self.assertIn("may be on the server", ran.err)

    def test_a_key_that_is_refused_after_a_lost_answer_leaves_the_doubt(self):
        """Control: without in_doubt() the entry counts as never sent, and fix makes two runs."""
        self.use(self.another(), "keys")
        lost = functools.partial(self.box.fault, "drop-after", "POST /v2/runs")
        refused = functools.partial(self.box.fault, "status", "POST /v2/runs", status=401)
        lost()
        refused()
        ran = self.create("A", status=3, env=NO_QUEUE)
        self.assertIn("may be stored", ran.err)
        self.offline("B")
        lost()
        refused()
        self.send(3, "--retries", "1")
        self.fails(2, "queue", "fix", self.ref("B"), "--set", "fixed=1")
        self.create("A", env=NO_QUEUE)
        self.delivered("A", "B")

    def test_a_run_that_perhaps_arrived_is_removed_with_a_word(self):
        self.offline("A")
        self.box.fault("drop-after", "POST /v2/runs")
        self.send(6)
        ran = self.ok("queue", "rm", self.ref("A"))
        self.assertIn("(waiting, and perhaps on the server)", ran.out)
        self.offline("B")
        ran = self.ok("queue", "rm", self.ref("B"))
        self.assertIn("(waiting)", ran.out)

    def test_files_that_went_up_another_way_are_not_attached_twice(self):
        """Control: the upload's ID alone tells whether a run has a file of the queue."""
        self.use(self.another(), "ways")
        self.with_files("A")
        self.create("A", *self.attach, env=NO_QUEUE)
        self.send()
        self.create("B", *self.attach)
        self.sql("UPDATE entry SET ended_at = 0")      # the receipts expire
        self.send()
        self.create("B", *self.attach)
        self.intact(A=self.files, B=self.files)

    def test_a_file_that_the_storage_has_lost_goes_up_again(self):
        """Control: without the except for FileFailed it fails at each pass."""
        self.use(self.another(), "lost")
        self.with_files("A")
        self.create("A", *self.attach, env=NO_QUEUE)
        self.box.fault("status", "GET /storage/{id}", times=None, status=404)
        self.send()
        self.has(sent=1)

    def test_a_file_whose_bytes_cannot_be_had_is_not_taken_for_one_of_the_queue(self):
        """The same name and size. Control: with needs_bytes false it is lost."""
        self.use(self.another(), "bytes")
        self.create("A", "--attach", self.file("x.txt", b"theirs"), env=NO_QUEUE)
        self.keep("A", "--attach", self.file("x.txt", b"mine!!"))
        real = runs.attachments_of

        def without_urls(*args):
            return [dict(row, download_url=None) for row in real(*args)]
        with patch("attachments_of", without_urls):
            self.send()
        (files,), = on_server(self.box).values()
        self.assertEqual([data for _, _, data in files], [b"theirs", b"mine!!"])

    def test_where_the_server_cannot_be_asked_after_a_refusal_the_doubt_stays(self):
        """Control: the error of the look swallowed, and fix makes a second run."""
        self.offline("A")
        self.box.fault("drop-after", "POST /v2/runs")
        self.send(6)
        self.box.fault("too_large", "POST /v2/runs", limit=10)
        self.box.fault("status", "GET /v2/runs", times=None)
        self.inside("queue", "retry")
        self.fails(2, "queue", "fix", self.ref("A"), "--set", "fixed=1")
        self.delivered("A")

    def test_a_run_whose_values_cannot_be_asked_for_is_parked_and_can_be_corrected(self):
        """Control: any refusal of the look taken for doubt."""
        self.keep("A", procedure="no-uuid")
        self.box.fault("drop-before", "POST /v2/runs")
        self.send(6)
        self.retry(5)
        self.ok("queue", "fix", self.ref("A"), "--procedure-id", "proc_abc")
        self.delivered("A")

    def kill_at_request(self, number, drop, *argv):
        """Runs a command line that is killed when its request of this number arrives."""
        known, seen = threading.Event(), []

        def strike(record):
            seen.append(record)
            if len(seen) == number:
                known.wait(30)
                os.kill(pid, 9)
                if drop:
                    self.box.fault("drop-before")
        self.box.on_request = strike
        pid = self.forge.start(self.folder, self.env, argv)
        known.set()
        ran = self.forge.end()
        self.calm()
        return ran

    def test_a_kill_at_any_request_loses_and_doubles_nothing(self):
        """Each request of create and of send, before and after the server has processed it.

        Control: with the link before the upload an empty attachment is on the run.
        """
        expected = {}
        drops = (False, True) if self.box.store.knows_ref else (True,)
        for command, drop in itertools.product(("create", "send"), drops):
            def step(number, command=command, drop=drop):
                serial = f"{command}-{drop}-{number}"
                expected[serial] = self.files
                words = create(serial, *self.attach)
                if command == "send":
                    self.ok(*words, "--offline")
                    words = ["queue", "send"]
                ran = self.kill_at_request(number, drop, *words)
                self.retry()
                return ran
            self.until_done(step, 8)
        self.intact(**expected)
        self.has(sent=len(expected))

    def kill_sends(self, **which):
        """Kills a send of a run with files at its statements. Returns what is wrong then."""
        expected = {}

        def step(number):
            serial = f"A{number}"
            expected[serial] = self.files
            self.with_files(serial)
            ran = self.do("queue", "send", patch=KILL, n=number, status=None)
            self.retry()
            return ran
        self.until_done(step, 15, **which)
        found = {}
        for serial, rows in on_server(self.box).items():
            if serial in expected:
                found[serial] = rows
        return account(found, expected)

    def test_a_kill_at_any_statement_of_send_loses_and_doubles_nothing(self):
        """At every second one here, at the others on the old server; on Windows at half of them."""
        first = 1 if self.box.store.knows_ref else 2
        stride = 2 if HAS_FORK else 4
        self.assertEqual(self.kill_sends(first=first, stride=stride), {})

    def test_a_kill_while_several_lanes_send_loses_and_doubles_nothing(self):
        """Four lanes, each somewhere else, at statements spread over the pass."""
        expected = {}
        for number in range(20, 140, 10 if HAS_FORK else 20):
            for name in "abcdef":
                serial = f"{name}{number}"
                files = {name + ".txt": serial.encode()}
                expected[serial] = files
                self.store(serial, **files)
            self.do("queue", "send", patch=KILL, n=number, status=None)
            if number % 40 == 0:
                self.retry()
        self.delivered(**expected)


class ExactlyOnceOnAnOldServer(ExactlyOnce):
    """The same on a server that does not know client_run_ref, and asks for a look."""
    options = {"knows_ref": False}

    def test_without_the_look_runs_are_doubled(self):
        """The control of the kills: one at the statement after the answer makes a second run."""
        for number in range(12, 60):
            serial = f"A{number}"
            self.offline(serial)
            self.do("queue", "send", patch=NO_LOOK + KILL, n=number, status=None)
            self.do("queue", "retry", patch=NO_LOOK)
            if len(on_server(self.box)[serial]) == 2:
                return
        self.fail("no run is there twice")

    def test_a_create_without_a_queue_that_may_have_arrived_says_to_look_first(self):
        """Control: the usual hint calls the same command safe, and it makes a second run."""
        self.box.fault("drop-after", "POST /v2/runs")
        self.box.fault("drop-before", "GET .*", times=None)
        ran = self.create("A", *ONCE, status=6, env=NO_QUEUE)
        self.assertIn("look first, with ls --serial-numbers A", ran.err)
        self.calm()
        self.assertEqual(len(self.stored()), 1)

    def test_a_look_that_is_refused_is_no_answer_and_nothing_is_sent_again(self):
        """Control: with only Unavailable caught round the look the run doubles."""
        for number, status in enumerate((401, 403, 404, 503)):
            self.offline(f"A{number}")
            self.box.fault("drop-after", "POST /v2/runs", times=None)
            self.box.fault("status", "GET /v2/runs", times=None, status=status)
            ran = self.inside("queue", "send", "--retries", "1")
            self.assertIn("may be stored", ran.out)
            self.calm()
            self.retry()
        self.intact("A0", "A1", "A2", "A3")

    def test_serials_that_differ_in_case_are_two_runs(self):
        """Control: compared as they are, the second adopts the run of the first."""
        self.offline("sn1", "SN1")
        self.send()
        self.assertEqual(len(self.stored()), 2)
        self.offline("sn2", "SN2")
        self.box.fault("drop-before", "POST /v2/runs", skip=1)
        self.inside("queue", "send")
        self.retry()
        self.assertEqual(len(self.stored()), 4)

    def test_a_move_brings_the_doubt_about_a_run_along(self):
        """Control: without tried_at in what merge() takes over it is sent twice."""
        words = create("A", "--offline")
        for path in self.path, "stick":
            self.ok(*words, "--queue", path)
        self.box.fault("drop-after", "POST /v2/runs")
        self.send(6)
        self.ok("queue", "move", "stick")
        self.delivered("A", at=["stick"])


class Crowd(QueueCase):
    """Several processes and threads at one queue file."""

    def test_four_senders_and_sixteen_writers_bring_each_run_to_the_server_once(self):
        """Control: with the senders' lock patched away entries are sent by several."""
        self.box.store.knows_ref = False
        serials = [f"A{number}" for number in range(16)]
        self.offline("A0")
        crowd = []
        for number, serial in enumerate(serials):
            more = ["--offline"] if number % 2 else []
            crowd.append(self.start(*create(serial, *more)))
            if number in (3, 6, 9, 12):
                crowd.append(self.start("queue", "send"))
        for process in crowd:
            self.ended(process, 0)
        self.due()
        self.send()
        self.intact(*serials)
        self.has(sent=16)

    def test_two_creates_of_one_request_at_a_time_are_one_entry_and_one_run(self):
        self.box.store.knows_ref = False
        forges = [self.forge, Forge()]
        self.addCleanup(forges[1].close)
        rounds = 20 if HAS_FORK else 8
        for number in range(rounds):
            self.path = self.at(f"{number % 4}.q")
            self.env["TOFUPILOT_QUEUE"] = self.path
            more = ["--offline"] if number % 2 else []
            for forge in forges:
                forge.start(self.folder, self.env, create(f"A{number}", *more))
            for ran in [forge.end() for forge in forges]:
                self.assertEqual(ran.status, 0, ran)
                self.assertEqual(ran.err, "", ran)
            self.retry()
            self.has(sent=1 + number // 4)
        self.intact(*(f"A{number}" for number in range(rounds)))

    def test_threads_that_store_beside_a_process_that_stores_and_one_that_sends(self):
        """Nothing is lost, nobody sees a disk I/O error.

        Control: a second descriptor on the queue file drops the locks of this process.
        """
        code = (f"import sys; sys.path.insert(0, {HERE!r}); import tofupilot_runs as t\n"
                f"body = {BODY!r}\n"
                "for number in range(12):\n"
                "    t.store(dict(body, serial_number='P%d' % number), [('p', b'p' * 9000)])\n")
        self.offline("first")
        storing = self.popen(sys.executable, "-B", "-I", "-S", "-c", code)
        sending = [self.start("queue", "send") for _ in range(2)]

        def store(thread):
            for number in range(12):
                body = body_of(f"T{thread}-{number}")
                runs.store(body, [("t", b"t" * 9000)], queue=self.path)
        threads = [runs.start_thread(store, number) for number in range(2)]
        for wait in threads:
            wait()
        for process in [storing, *sending]:
            self.assertNotIn("error", self.ended(process, 0).err)
        expected = {}
        for number in range(12):
            expected[f"P{number}"] = {"p": b"p" * 9000}
            expected[f"T0-{number}"] = expected[f"T1-{number}"] = {"t": b"t" * 9000}
        self.delivered("first", **expected)


class BadDisk(QueueCase):
    """A queue that cannot be written: the run goes directly, or is told to be not stored."""

    def broken(self):
        """(name, path) of what is no usable queue."""
        self.offline("old")
        data = content(self.path)
        newer, foreign = self.file("newer.queue", data), self.at("foreign.db")
        self.sql("PRAGMA user_version = 2", path=newer)
        self.sql("CREATE TABLE mine (x)", path=foreign)
        self.sql("PRAGMA user_version = 1", path=foreign)
        os.mkdir("folder")
        text = b"Dear queue, this is no SQLite file.\n" * 9
        damaged = data[:100] + b"\xa5" * (len(data) - 100)
        found = [("a folder", self.at("folder")), ("newer", newer), ("foreign", foreign),
                 ("in no folder", self.at("missing", "x.queue")),
                 ("text", self.file("notes.txt", text)),
                 ("short", self.file("short", b"SQLite format 3")),
                 ("zeros", self.file("zeros", bytes(5000))),
                 ("cut", self.file("cut.queue", data[:4096])),
                 ("damaged", self.file("damaged.queue", damaged))]
        if POSIX and os.geteuid() != 0:
            read_only = self.file("read only.queue", data)
            os.chmod(read_only, 0o400)
            found.append(("read only", read_only))
        if hasattr(os, "mkfifo"):
            os.mkfifo("fifo")
            found.append(("fifo", self.at("fifo")))
        return found

    def test_a_broken_queue_is_left_as_it_is_and_the_run_is_sent_directly(self):
        """Also when a process comes to it again. Control: swallow the error of Queue()."""
        for number, (name, path) in enumerate(self.broken()):
            before = None if name == "fifo" else content(path)
            queue, serial = {"TOFUPILOT_QUEUE": path}, f"A{number}"
            ran = self.create(serial, env=queue)
            self.assertIn("Created", ran.out)
            self.assertRegex(ran.err, "warning.*" + re.escape(path))
            self.box.fault("drop-before", times=None)
            ran = self.create("lost" + serial, *ONCE, env=queue, status=6)
            self.assertIn("NOT stored", ran.err)
            self.calm()
            ran = self.keep("off" + serial, "--json", env=queue, status=6)
            self.assertRegex(ran.error["message"], f"(?s){re.escape(path)}.*NOT stored")
            self.fails(4 if name == "in no folder" else 6, "queue", "ls", env=queue)
            with self.assertRaises(runs.Unavailable):
                runs.store(BODY, queue=path)
            self.assertEqual(None if name == "fifo" else content(path), before, name)
            self.assertEqual(len(on_server(self.box)), number + 1, name)

    def test_check_fails_where_no_queue_can_be_made(self):
        self.nameless("TOFUPILOT_QUEUE")
        ran = self.fails(6, "check", "--queue", self.at("no", "q"))
        self.assertIn("FAIL  queue", ran.out)
        ran = self.ok("check")
        self.assertIn("ok    queue", ran.out)      # the home is made when needed

    def fill_at(self, number, command, serials):
        """Runs a command on a disk that is full from a statement on. Returns its Ran."""
        real = runs.Queue.sql
        seen = [0]

        def sql(queue, statement, *values):
            seen[0] += 1
            if seen[0] >= number and statement.split()[0] in ("INSERT", "UPDATE", "COMMIT"):
                raise queue.unusable("database or disk is full")
            return real(queue, statement, *values)
        for name in glob.glob("*queue*"):
            os.unlink(name)
        self.offline(*serials)
        with patch_queue("sql", sql):
            ran = self.inside(*command)
        self.assertIn(ran.status, (0, 6), ran)
        return ran

    def test_a_disk_that_fills_at_any_statement_leaves_what_is_stored(self):
        """The error of a full disk from each writing statement on, in create, send and move."""
        new = create("new", "--offline", "--attach", self.file("c.txt", b"c" * 200000))
        for command in (new, ["queue", "send"], ["queue", "move", "stick.queue"]):
            for number in range(1, 999, 3):
                ran = self.fill_at(number, command, ["A", "B"])
                if command is new:
                    self.assertEqual("NOT stored" in ran.err, ran.status == 6)
                    serials = [row["serial_number"] for row in self.listed()]
                    self.assertEqual(serials, ["A", "B"] if ran.status else ["A", "B", "new"])
                elif command[1] == "move":
                    self.ok("queue", "move", "stick.queue")
                    self.retry(0, "--queue", "stick.queue")
                self.retry()
                if ran.status == 0:
                    break
            self.assertGreater(number, 9)
        self.intact("A", "B", new={"c.txt": b"c" * 200000})

    @unittest.skipUnless(sys.platform == "linux" and os.geteuid() == 0, "mounting needs root")
    def test_a_full_tmpfs_keeps_what_is_stored_and_the_next_run_goes_directly(self):
        disk, roomy = self.at("disk"), self.at("roomy.queue")
        os.mkdir(disk)
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
        if subprocess.call(command, stderr=subprocess.DEVNULL):
            self.skipTest("mount does not work here")
        self.addCleanup(subprocess.call, ["umount", "-l", disk])
        self.env["TOFUPILOT_QUEUE"] = self.path = os.path.join(disk, "line.queue")
        expected = {}
        for number in range(24):
            ran = self.inside(*create(f"A{number}", "--offline", *self.attach))
            if ran.status == 0:
                expected[f"A{number}"] = self.files
            else:
                self.assertEqual(ran.status, 6)
                self.assertTrue("NOT stored" in ran.err)
        self.assertIn(len(expected), range(1, 24))
        answer = self.create("direct", *self.attach)
        self.assertIn("warning", answer.err)
        self.ok("queue", "move", roomy)
        with open(os.path.join(disk, "filler"), "wb", 0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1000)):
                pass
        os.truncate(filler.name, os.path.getsize(filler.name) - 120000)     # for the tables alone
        self.env["TOFUPILOT_QUEUE"] = roomy
        target = os.path.join(disk, "other.queue")
        self.fails(6, "queue", "move", target)
        self.assertEqual(len(self.listed()), len(expected))
        for path in (filler.name, self.path):
            os.unlink(path)
        self.ok("queue", "move", target)
        self.send(0, "--queue", target)
        self.intact(direct=self.files, **expected)


class Stored(QueueCase):
    """Once it is stored nothing turns exit 0 into another, and a log stops nothing."""

    def harmed_streams(self):
        """Keyword arguments of processes whose stdout or stderr is full, has no reader, is closed.

        Windows gives a process all three streams.
        """
        full = unwritable()
        gone = gone_reader()
        self.addCleanup(full.close)
        self.addCleanup(os.close, gone)
        found = [{"stdout": full}, {"stdout": gone}, {"stderr": full}, {"stderr": gone},
                 {"stdout": full, "stderr": full}]
        if POSIX:
            for numbers in ((1, 2), (2, 3), (1, 3)):
                found.append({"preexec_fn": functools.partial(os.closerange, *numbers)})
        return found

    def test_streams_that_are_full_or_closed_after_the_commit_are_exit_0(self):
        """stdout and stderr. A future run warns, so that stderr is written to."""
        count = 0
        for streams in self.harmed_streams():
            for more in ("--offline", "--json"):
                words = create(f"A{count}", more)
                words[words.index(END)] = "2099-05-19T08:00:42Z"
                ran = self.run_script(*words, status=0, **streams)
                self.assertNotIn("Exception", ran.err)
                count += 1
        self.due()
        self.send()
        self.has(sent=count)

    def test_a_log_that_cannot_be_written_stops_nothing_and_changes_no_status(self):
        """Control: without the suppress in log() the pass ends after one run."""
        for number, streams in enumerate(self.harmed_streams()):
            self.use(self.another(), f"q{number}")
            self.offline("A", "B", "BAD", "C")
            self.when("BAD", "status", status=422)
            self.run_script("queue", "send", status=5, **streams)
            self.has(sent=3, parked=1)

    def test_ctrl_c_and_sigterm_after_the_commit_are_exit_0(self):
        for number, sign in enumerate(SIGNALS):
            arrived, go_on = threading.Event(), threading.Event()

            def hold(_, arrived=arrived, go_on=go_on):
                arrived.set()
                go_on.wait(30)
            self.box.on_request = hold
            process = self.start_interruptible(*create(f"A{number}", "--json"))
            self.assertTrue(arrived.wait(30))
            self.interrupt(process, sign)
            said = self.ended(process, 0).json
            go_on.set()
            self.assertIsNone(said["id"])
            self.assertTrue(said["queued"])
            self.calm()
            self.retry()
        self.intact(*(f"A{number}" for number in range(len(SIGNALS))))

    def test_nothing_that_happens_after_the_commit_is_told_as_a_failure(self):
        """Ctrl-C, or a queue that cannot be read any more, at each statement after the COMMIT."""
        self.offline("old")
        happenings = (("ctrl-c", "__import__('_thread').interrupt_main()"),
                      ("locked", "raise self.unusable('database is locked')"))
        for (name, what), number in itertools.product(happenings, range(1, 6)):
            patch = AT_STATEMENT % (
                "sql == 'COMMIT': seen[0] = 1000\n    if seen[0] == 1000 + n: " + what)
            self.do(*create(f"{name}-{number}", "--offline"), n=number, patch=patch)
        self.has(waiting=11)

    def test_no_thread_to_be_had_is_exit_0_and_the_run_waits(self):
        """Control: without the except for RuntimeError, exit 1 after the commit."""
        with without_threads():
            said = self.create("A", "--json").json
        self.assertIsNone(said["id"])
        self.assertTrue(said["queued"])
        self.delivered("A")

    def test_a_server_that_never_answers_holds_a_create_for_a_limited_time(self):
        """With ten seconds patched to none. Control: a wait for the end of the pass, which takes
        down that nobody answered.
        """
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        self.box.fault("slow", event=go_on, times=None)
        words = create("A", "--json", "--timeout", "2")
        said = self.do(*words, patch="runs.QUEUED_SECONDS = 0").json
        self.assertEqual(self.entry("A")["tries"], 0)
        self.assertTrue(said["queued"])
        self.calm()
        go_on.set()
        self.delivered("A")
# ==== TOOLS =======================================================================================
#
# Trials (random kills and faults, the fleet after an outage), demo, bench, the runner and main.

# ---- trials --------------------------------------------------------------------------------------

# What happens to a request of a trial. A 413, a proxy's page, parks the run, which is then fixed.
ROUGH = ["drop-before", "drop-after", "reset", "cut", "status", "portal"] * 3
ROUGH += ["too_large"] * 4
KILLED = (KILL_STATUS, -14)     # by itself at a statement, by its alarm
WRONG = ("lost", "doubled", "files missing", "files doubled", "files empty", "files changed",
         "unknown", "bugs")
TRIAL_FILES = {"one.txt": b"1", "some.txt": b"2" * 700, "more.bin": b"3" * 70000}


def full_disk(chance):
    """Options of a command line for which the disk is full from some statement on."""
    return {"patch": FULL_DISK, "n": chance.randint(1, 40)}


def other_drive_folder():
    """A new folder on the drive D: of Windows, None where there is no such drive to write on."""
    if not POSIX:
        with contextlib.suppress(OSError):
            return tempfile.mkdtemp("", "trial-", "D:\\")
    return None


class Trial:
    """Random kills of create, send, retry, fix and move at three queue files, on a rough server.

    `wanted` kills, but none after the time `until`. `crowd`: the roles of workers at one file,
    "writer" or "sender"; without it two workers do all, at three files, one of them on D: where
    Windows has such a drive.
    """

    def __init__(self, wanted, seed, knows_ref, until, crowd=()):
        self.wanted = wanted
        self.seed = seed
        self.until = until
        self.roles = crowd or ("all", "all")
        self.latest_alarm = 0.03 if HAS_FORK else 0.3
        self.box = Sandbox(knows_ref=knows_ref)
        self.folder = tempfile.mkdtemp("", "trial-", RAM)
        self.other_folder = other_drive_folder() or self.folder
        self.queues = [os.path.join(self.folder, "a.queue")]
        if not crowd:
            self.queues.append(os.path.join(self.folder, "b.queue"))
            self.queues.append(os.path.join(self.other_folder, "c.queue"))
        self.env = dict(clean_environment(), TOFUPILOT_HOME=self.folder,
                        TOFUPILOT_URL=self.box.url, TOFUPILOT_API_KEY=self.box.user_key)
        self.lock = threading.Lock()
        self.kills = 0
        self.commands = collections.Counter()
        self.expected = {}      # serial number: {name of a file: its bytes}
        self.bugs = []
        for name, data in TRIAL_FILES.items():
            save(os.path.join(self.folder, name), data)

    def run(self):
        """All kills, then without faults all that waits. Returns {what is wrong: how often}."""
        with self.box:
            self.box.keep = False
            self.box.chaos(0.25, self.seed, ROUGH)
            with contextlib.closing(multiprocessing.pool.ThreadPool(len(self.roles))) as pool:
                pool.map(self.work, range(len(self.roles)))
            self.box.calm()
            with contextlib.closing(Forge()) as worker:
                self.drain(worker)
            found = account(on_server(self.box), self.expected)
        for folder in (self.folder, self.other_folder):
            shutil.rmtree(folder, ignore_errors=True)
        if self.bugs:
            found["bugs"] = len(self.bugs)
        return found

    def is_over(self):
        return self.kills >= self.wanted or time.time() > self.until

    def harm(self, chance, may_fill):
        """How a command line is to be harmed: the options for the worker's run."""
        share = chance.random()
        if self.is_over() or share < 0.1:
            return {}
        if share < 0.15 and may_fill:
            return full_disk(chance)
        if share < 0.6:
            return {"alarm": chance.uniform(0.001, self.latest_alarm)}
        return {"patch": KILL, "n": chance.randint(1, 90)}

    def do(self, worker, words, **options):
        """The Ran of one command line."""
        ran = worker.run(self.folder, self.env, words, **options)
        name = words[0]
        if name == "queue":
            name = f"queue {words[1]}"
        with self.lock:
            self.commands[name] += 1
            self.kills += ran.status in KILLED
            if ran.status in (1, 99) or "Traceback" in ran.err:
                self.bugs.append(ran)
        return ran

    def work(self, number):
        """One worker: command lines at random, until there were kills enough."""
        chance = random.Random(self.seed * 100 + number)
        role = self.roles[number]
        count = 0
        with contextlib.closing(Forge()) as worker:
            while not self.is_over():
                queue = chance.choice(self.queues)
                share = chance.random()
                if role == "writer" or role == "all" and share < 0.55:
                    self.store(worker, chance, f"S{number}-{count}", queue)
                    count += 1
                elif role == "sender" or share < 0.8:
                    word = chance.choice(["send", "retry"])
                    self.do(worker, ["queue", word, "--queue", queue], **self.harm(chance, True))
                elif share < 0.9:
                    target = chance.choice(self.queues)
                    words = ["queue", "move", target, "--queue", queue]
                    self.do(worker, words, **self.harm(chance, True))
                else:
                    self.fix(worker, chance, queue)

    def store(self, worker, chance, serial, queue):
        """A create, and as an operator does the same again until it is stored."""
        names = chance.sample(sorted(TRIAL_FILES), chance.randint(0, 3))
        words = create(serial, "--queue", queue)
        is_offline = chance.random() < 0.5
        if is_offline:
            words.append("--offline")
        if names:
            words += ["--attach", *names]
        with self.lock:
            self.expected[serial] = {name: TRIAL_FILES[name] for name in names}
        for tries in range(100):
            # Only --offline meets a full disk: without it the run would be sent directly.
            options = self.harm(chance, is_offline) if tries < 50 else {}
            ran = self.do(worker, words, **options)
            if ran.status in (0, 5):        # stored, or stored and parked meanwhile
                return
        self.bugs.append(ran)

    def fix(self, worker, chance, queue):
        """Corrects an entry that a 413 has parked."""
        listed = self.do(worker, ["queue", "ls", "--json", "--queue", queue])
        if listed.status != 0:      # there is no such file yet
            return
        parked = []
        for row in listed.json["data"]:
            if row["state"] == "parked":
                parked.append(row["client_run_ref"])
        if parked:
            ref = chance.choice(parked)
            words = ["queue", "fix", ref, "--set", "fixed=1", "--queue", queue]
            self.do(worker, words, **self.harm(chance, True))

    def unfinished(self, path):
        """(state, target) of what is not on the server yet, in a queue file."""
        with contextlib.closing(sqlite3.connect(path)) as db:
            return db.execute("SELECT state, target FROM entry WHERE state IN ('waiting', "
                              "'parked', 'moving')").fetchall()

    def drain(self, worker):
        """Finishes moves and sends until nothing waits."""
        for _ in range(20):
            waiting = 0
            for path in filter(os.path.exists, self.queues):
                rows = self.unfinished(path)
                waiting += len(rows)
                targets = {target for state, target in rows if state == "moving"}
                for target in targets:
                    target = target.partition(" ")[2]       # before it stands its identity
                    self.do(worker, ["queue", "move", target, "--queue", path])
                self.do(worker, ["queue", "retry", "--queue", path])
            if not waiting:
                return


CROWD = ("writer",) * 16 + ("sender",) * 4
if not HAS_FORK:        # each command line takes a process that starts from nothing
    CROWD = ("writer",) * 4 + ("sender",) * 2


def trials(argv):
    """Kills create, send, retry, fix and move at random moments, with a quarter of the requests
    failing and disks that fill; then sends all, and counts what is on the server.

    Half of the kills are with a server that knows client_run_ref, half without; a tenth of each
    with sixteen writers and four senders at one queue file.
    """
    parser = argparse.ArgumentParser(prog="test_tofupilot_runs.py trials",
                                     description=trials.__doc__)
    parser.add_argument("--kills", type=int, default=10000, help="how many (10000)")
    parser.add_argument("--seed", type=int, default=1, help="of what is random (1)")
    parser.add_argument("--minutes", type=float, default=60, help="end after so long (60)")
    args = parser.parse_args(argv)
    started = time.time()
    parts = [(knows_ref, crowd) for crowd in ((), CROWD) for knows_ref in (False, True)]
    wrong, kills, count = collections.Counter(), 0, 0
    for number, (knows_ref, crowd) in enumerate(parts):
        share = 0.05 if crowd else 0.45
        wanted = int(share * args.kills)
        until = time.time() + share * 60 * args.minutes
        trial = Trial(wanted, args.seed + number, knows_ref, until, crowd)
        found = trial.run()
        wrong.update(found)
        kills += trial.kills
        count += len(trial.expected)
        done = dict(trial.commands)
        print(f"  {trial.kills} kills, {len(trial.expected)} runs, wrong: {found}; {done}",
              flush=True)
        for ran in trial.bugs[:3]:
            print(ran)
    took = time.time() - started
    found = [f"{wrong[what]} {what}" for what in WRONG]
    print(f"{kills} kills, {count} runs in {took:.0f} s:", ", ".join(found))
    return 1 if wrong else 0


# ---- the fleet -----------------------------------------------------------------------------------

REQUEST_SECONDS = 0.05      # from a request to its answer
CAPACITY = 20               # requests that the server takes in each second


class Station:
    """A station of the fleet: its queue and the pass at work, with as many lanes as the script."""

    def __init__(self, fleet, count):
        self.fleet = fleet
        self.waiting = [{"next_try_at": 0, "failed_at": None, "tries": 0} for _ in range(count)]
        self.minute = 0
        self.refused_at = -math.inf
        self.begin_pass(0)

    def begin_pass(self, now):
        """cron starts a pass at the next minute, which waits for its jitter."""
        fleet = self.fleet
        begin = 60 * self.minute
        if fleet.has_jitter:
            begin += runs.delay(0, 60)
        self.width = 1
        self.in_flight = 0
        self.is_stopped = False
        self.entries = None     # what the pass has still to consider, once it has begun
        fleet.at(max(now, begin), self.go_on)

    def go_on(self, now):
        """Sends what is due, in as many lanes as are open; the pass may come to its end."""
        if self.entries is None:
            self.entries = collections.deque(self.waiting)
        while self.entries and not self.is_stopped and self.in_flight < self.width:
            entry = self.entries.popleft()
            if runs.is_due(entry, now):
                self.in_flight += 1
                is_taken = self.fleet.server_takes(now)
                self.fleet.at(now + REQUEST_SECONDS,
                              functools.partial(self.answered, entry, is_taken))
        if self.in_flight == 0 and self.waiting:
            self.minute = max(self.minute + 1, int(now // 60))  # a pass keeps the next one out
            self.begin_pass(now)

    def answered(self, entry, is_taken, now):
        """One request has its answer: taken, or 429."""
        self.in_flight -= 1
        if is_taken:
            self.waiting.remove(entry)
            if now > self.refused_at + runs.CALM_SECONDS:
                self.width = runs.MOST_LANES
        else:
            verdict = runs.judge(self.fleet.error, entry["tries"])
            entry["tries"] += 1
            entry["failed_at"] = now
            entry["next_try_at"] = now + verdict.wait
            self.refused_at = now
            self.width = 1
            if verdict.effect == "end":
                self.is_stopped = True
        self.go_on(now)


class Fleet:
    """200 stations with 50 runs each after an outage, by a simulated clock.

    The waiting rules are those of the script: cron begins a pass each minute with --jitter 60, a
    pass has up to four requests under way, but one until the first answer, and one for a while
    after a 429, which ends it. The server takes 20 requests in each second and answers 429 to the
    others, with a Retry-After of `asked` seconds, or without one (None).
    """

    def __init__(self, asked=None, has_jitter=True, stations=200, runs_each=50):
        self.has_jitter = has_jitter
        self.error = runs.Unavailable("429", status=429)
        self.error.retry_after = asked
        self.events = []            # heap of (time, number, what is to be done)
        self.numbers = itertools.count()
        self.seen = collections.Counter()       # requests by second
        self.count = stations * runs_each
        self.last_taken = 0
        self.stations = [Station(self, runs_each) for _ in range(stations)]

    def at(self, moment, action):
        heapq.heappush(self.events, (moment, next(self.numbers), action))

    def server_takes(self, now):
        self.seen[int(now)] += 1
        is_taken = self.seen[int(now)] <= CAPACITY
        if is_taken:
            self.last_taken = now
        return is_taken

    def run(self):
        """(time to drain over the ideal, share of requests refused, most in one second)."""
        while self.events:
            now, _, action = heapq.heappop(self.events)
            action(now)
        ideal = self.count / CAPACITY
        refused = 1 - self.count / sum(self.seen.values())
        return self.last_taken / ideal, refused, max(self.seen.values())


def run_fleet(asked=None, has_jitter=True, seed=1):
    """A Fleet's figures. Without jitter nothing is random: all stations wait the same time."""
    uniform = random.Random(seed).uniform if has_jitter else lambda low, high: high
    with mock.patch.object(random, "uniform", uniform):
        return Fleet(asked, has_jitter).run()


class Trials(unittest.TestCase):
    """What the trials hold, in short: `make trials` has 10,000 kills."""
    is_slow = True

    def assert_nothing_lost(self, trial, least):
        wrong = trial.run()
        self.assertEqual((wrong, trial.bugs), ({}, []))
        self.assertGreaterEqual(trial.kills, least)

    def test_random_kills_and_faults_lose_and_double_nothing(self):
        for knows_ref in (False, True):
            with self.subTest(knows_ref=knows_ref):
                wanted = 30 if HAS_FORK else 12
                trial = Trial(wanted, 7, knows_ref, time.time() + 250)
                self.assert_nothing_lost(trial, wanted)

    def test_a_crowd_of_writers_and_senders_that_are_killed_loses_and_doubles_nothing(self):
        for knows_ref in (False, True):
            with self.subTest(knows_ref=knows_ref):
                wanted = 12 if HAS_FORK else 6
                trial = Trial(wanted, 9, knows_ref, time.time() + 250, CROWD)
                self.assert_nothing_lost(trial, wanted)

    def test_the_account_sees_what_is_wrong(self):
        """The control of all trials."""
        file, data = ("a.txt", 1, b"a"), {"a.txt": b"a"}
        cases = {
            "lost": {},
            "doubled": {"S": [[file], [file]]},
            "files missing": {"S": [[]]},
            "files doubled": {"S": [[file, file]]},
            "files empty": {"S": [[("a.txt", None, b"")]]},
            "files changed": {"S": [[("a.txt", 1, b"b")]]},
            "unknown": {"S": [[file]], "T": [[]]},
        }
        for what, found in cases.items():
            self.assertEqual(account(found, {"S": data}), {what: 1})
        self.assertEqual(account({"S": [[file]]}, {"S": data}), {})


class FleetAfterAnOutage(unittest.TestCase):
    """Stations that come back together do not keep each other out."""
    is_slow = True

    def test_it_drains_in_one_and_a_half_times_the_ideal(self):
        for asked in (None, 1, 10):
            figures = [run_fleet(asked, seed=seed) for seed in range(5)]
            over_ideal, refused, _ = map(statistics.median, zip(*figures))
            self.assertLessEqual(over_ideal, 1.5, asked)
            self.assertLess(refused, 0.25, asked)

    def test_without_anything_random_it_takes_many_times_as_long(self):
        """The control of the other test."""
        over_ideal, refused, _ = run_fleet(has_jitter=False)
        self.assertGreater(over_ideal, 3)
        self.assertGreater(refused, 0.5)


# ---- form ----------------------------------------------------------------------------------------

def read_text(path):
    """The text of a file, with the line ends of Unix."""
    text = content(path).decode("utf-8")
    return text.replace("\r\n", "\n")


def sections_of(text):
    """[(number of the first line, title)] of the banners of a file."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"# ---- (.+?) -{3,}$", line)
        if match:
            found.append((number, match.group(1)))
    return found


def section_at(sections, line):
    """The index of the section that a line stands in; -1 before the first."""
    return sum(1 for first, _ in sections if first <= line) - 1


def names_made(statement):
    """The names that a statement at the top level of a module makes."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return set()
    stored = [node for node in ast.walk(statement)
              if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {node.id for node in stored}


def globals_used(table):
    """The global names that a function or class, or what is inside it, uses (symtable)."""
    used = {symbol.get_name() for symbol in table.get_symbols()
            if symbol.is_global() and symbol.is_referenced()}
    for child in table.get_children():
        used |= globals_used(child)
    return used


def loaded_names(node):
    """The names that are read anywhere in a piece of syntax."""
    return {part.id for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}


def names_used(statement, tables):
    """The names of the module that a statement at its top level uses, now or when it is called."""
    if isinstance(statement, ast.FunctionDef):
        return globals_used(tables[statement.name])
    if isinstance(statement, ast.ClassDef):
        used = globals_used(tables[statement.name])
        for base in statement.bases:
            used |= loaded_names(base)
        return used
    return loaded_names(statement)


def upward_calls(text):
    """["name (section) uses name (section)"] where a section uses a name of one below it."""
    sections = sections_of(text)
    titles = [title for _, title in sections]
    tree = ast.parse(text)
    table = symtable.symtable(text, "script", "exec")
    tables = {child.get_name(): child for child in table.get_children()}
    home = {}
    for statement in tree.body:
        for name in names_made(statement):
            home.setdefault(name, section_at(sections, statement.lineno))
    found = []
    for statement in tree.body:
        here = section_at(sections, statement.lineno)
        user = " ".join(sorted(names_made(statement)))
        for name in sorted(names_used(statement, tables)):
            there = home.get(name, here)
            if there > here:
                found.append(f"{user} ({titles[here]}) uses {name} ({titles[there]})")
    return found


def code_lines(text, tree):
    """The numbers of lines with code: neither comments nor docstrings."""
    beside = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in beside:
            first, last = token.start[0], token.end[0]
            lines.update(range(first, last + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def density(text):
    """Syntax nodes for each line of code."""
    tree = ast.parse(text)
    small = (ast.Load, ast.Store, ast.Del, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
    nodes = [node for node in ast.walk(tree) if not isinstance(node, small)]
    return len(nodes) / len(code_lines(text, tree))


SDK_METHODS = "list get create update update_metadata create_attachment delete iterate attach"


class Form(unittest.TestCase):
    """The shape of the two files: what makes them readable is held as other promises are."""

    @classmethod
    def setUpClass(cls):
        cls.script = read_text(SCRIPT)
        cls.tests = read_text(__file__)
        cls.texts = {"the script": cls.script, "the tests": cls.tests}

    def test_no_line_is_longer_than_100_columns(self):
        for path, text in self.texts.items():
            for number, line in enumerate(text.splitlines(), 1):
                self.assertLessEqual(len(line), 100, (path, number))

    @unittest.skipIf(sys.version_info < (3, 8), "the end of a function is known from Python 3.8 on")
    def test_no_function_is_longer_than_60_lines(self):
        for path, text in self.texts.items():
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    length = node.end_lineno - node.lineno + 1
                    self.assertLessEqual(length, 60, (path, node.name))

    @unittest.skipIf(sys.version_info < (3, 9), "older Pythons count the syntax in another way")
    def test_the_code_is_not_pressed_together(self):
        self.assertLessEqual(density(self.script), 6.0)
        self.assertLessEqual(density(self.tests), 7.0)

    def test_each_section_of_the_script_uses_only_those_above_it(self):
        self.assertEqual(upward_calls(self.script), [])
        control = self.script + "# ---- the end ----\n\n\ndef last():\n    pass\n"
        control = control.replace("# ---- errors ----", "def first():\n    return last()\n\n\n"
                                  "# ---- errors ----")
        self.assertEqual(upward_calls(control), ["first (identity) uses last (the end)"])

    def test_the_docstring_of_the_script_names_its_sections_in_their_order(self):
        docstring = self.script.split('"""')[1]
        listed = re.findall(r"^    (\w+(?: \w+)?)  +\S", docstring, re.M)
        titles = [title for _, title in sections_of(self.script)]
        self.assertEqual(listed, titles)

    def test_every_public_name_has_a_docstring(self):
        for name in runs.__all__:
            public = getattr(runs, name)
            self.assertTrue(public.__doc__, name)
            members = vars(public) if isinstance(public, type) else {}
            for member, value in members.items():
                if callable(value) and not member.startswith("_"):
                    self.assertTrue(value.__doc__, (name, member))

    def test_the_public_names_have_type_hints(self):
        functions = [runs.store, runs.Client.__init__]
        functions += [value for name, value in vars(runs.Client).items()
                      if callable(value) and name in SDK_METHODS.split()]
        self.assertGreater(len(functions), len(SDK_METHODS.split()))
        for function in functions:
            self.assertTrue(function.__annotations__, function)

    def test_a_field_of_a_wrong_form_is_an_error_when_the_script_is_imported(self):
        """Control: a kind that is looked up when a value is checked passes every import."""
        wrong = [("x", "txet"), ("x", "enum"), ("x", "record"), ("x", "any-of-these")]
        for arguments in wrong:
            with self.assertRaises((KeyError, TypeError)):
                runs.Field(*arguments)
        with self.assertRaises((KeyError, TypeError)):
            runs.Field("x", "text", choices=("A", "B"))

    def test_both_files_name_their_licence_near_the_top(self):
        for path, text in self.texts.items():
            self.assertTrue("SPDX-License-Identifier: MIT" in text[:2000], path)


# ---- README --------------------------------------------------------------------------------------

PYTEST_SAMPLE = """
def test_power(record_property):
    record_property("vcc", 3.3)
    assert 3.3 > 3.1
def test_radio(record_property):
    record_property("tx_power", 17.1)
    assert 17.1 > 18
"""
OPENHTF_SAMPLE = """
import openhtf, openhtf_report

@openhtf.measures(openhtf.Measurement("vcc").in_range(3.1, 3.4))
def power(test):
    test.measurements.vcc = 3.3

test = openhtf.Test(power, procedure_id="proc_abc")
test.add_output_callbacks(openhtf_report.report)
test.execute(test_start=lambda: "SN-0007")
"""


class ReadmePage(unittest.TestCase):
    """What the README says of the script is so, and it says all of it."""

    def setUp(self):
        self.text = readme_text()

    def test_the_page_is_short_and_finished(self):
        self.assertLess(len(self.text.splitlines()), 400)
        for word in ("<<OUTPUT", "<<LEAD", "TODO", "FIXME", "XXX"):
            self.assertFalse(word in self.text, word)

    def test_every_command_is_named(self):
        for name in runs.COMMANDS:
            if not name.startswith("attachments"):
                self.assertRegex(self.text, rf"(?:`|… |\.py |tofupilot_runs ){name}\b")

    def test_every_flag_that_is_named_is_one(self):
        known = {"--help", "--version", "--log-level"}      # the last is pytest's
        for command in runs.COMMANDS.values():
            known |= {runs.flag_name(field.name) for field in command.fields}
        known |= {runs.flag_name(field.name) for field in runs.GLOBAL.fields}
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", self.text))
        self.assertGreater(len(named), 25)
        self.assertEqual(named - known, set())

    def test_every_exit_status_has_its_row(self):
        rows = "\n".join(re.findall(r"^\| *[\d, ]+ *\|.*$", self.text, re.M))
        for status in (0, 1, 2, 3, 4, 5, 6, 10, 130, 143):
            self.assertRegex(rows, rf"(?m)^\|[\d, ]*\b{status}\b")

    def test_every_environment_variable_is_named(self):
        script = content(SCRIPT).decode("utf-8")
        for name in sorted(set(re.findall(r"TOFUPILOT_[A-Z_]+", script))):
            self.assertTrue(name in self.text, name)
        for name in ("NO_COLOR", "HTTPS_PROXY", "NO_PROXY"):
            self.assertTrue(name in self.text, name)

    def test_the_command_lines_for_cron_and_windows_are_ones_that_the_script_takes(self):
        blocks = re.findall(r"^```(?:cron|bat)\n(.*?)^```$", self.text, re.M | re.S)
        lines = [line for line in "".join(blocks).splitlines() if "tofupilot_runs" in line]
        self.assertGreater(len(lines), 3)
        for line in lines:
            line = re.split(r"tofupilot_runs(?:\.py)? ", line)[1].partition(" >>")[0]
            call = runs.parse(shlex.split(line.replace("\\", "/")))
            self.assertIn(call.name, runs.COMMANDS)


class ReadmeRecipes(Case):
    """What can be pasted from the README works as it stands there, in its order."""

    def setUp(self):
        super().setUp()
        self.text = readme_text()
        shutil.copy(SCRIPT, self.folder)
        python = self.file("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'.encode())
        os.chmod(python, 0o755)
        self.env["PATH"] = os.pathsep.join([self.folder, os.environ["PATH"]])

    def blocks(self, kind):
        """The fenced blocks of a kind."""
        return re.findall(rf"^```{kind}\n(.*?)^```$", self.text, re.M | re.S)

    def module(self, name):
        """Writes the Python block that begins with the name of a file. Returns its path."""
        for block in self.blocks("python"):
            if block.startswith(f"# {name}"):
                return self.file(name, block.encode("utf-8"))
        return self.fail(f"no block begins with # {name}")

    def arrived(self):
        """Sends what waits in the default queue. Returns the serial numbers on the server."""
        self.run_script("queue", "send")
        rows = self.ok("ls", "--json").json["data"]
        return {row["unit"]["serial_number"] for row in rows}

    @unittest.skipUnless(POSIX and shutil.which("bash"), "the recipes are for bash")
    def test_every_recipe_that_can_run_runs_in_its_order(self):
        recipes = self.blocks("sh")
        self.assertGreater(len(recipes), 8)
        shell = self.popen("bash", "-e", "-u")
        text = "\n".join(recipes).replace(" 7d", " 999w")        # their runs are of May 2026
        ran = self.ended(shell, 0, text.encode("utf-8"))
        self.assertIn("Created run", ran.out)
        self.assertGreater(len(self.stored()), 3)
        self.assertEqual(content("evidence/log.txt"), b"tx_power 17.1 dBm\n")
        self.assertGreater(len(content("measurements.xlsx")), 1000)

    def test_every_program_runs(self):
        self.file("log.txt")
        count = 0
        for program in self.blocks("python"):
            if not program.startswith(("# conftest.py", "# openhtf_report.py")):
                path = self.file("report.py", program.encode("utf-8"))
                self.ended(self.popen(sys.executable, "-B", path), 0)
                count += 1
        self.assertGreater(count, 0)
        self.assertIn("SN-0006", self.arrived())

    if not POSIX:
        def test_the_lines_for_windows_run_in_cmd(self):
            """Also those of the file for the Task Scheduler; schtasks itself is left out."""
            os.mkdir("files")
            save("files/a.png", b"png")
            save("key.txt", self.box.user_key.encode())
            self.ok("create", "--example", "--out", "run.json")
            block, = self.blocks("bat")
            block = re.sub(r"C:\\station(\S*)", lambda place: f'"{self.folder}{place[1]}"', block)
            block = runs.replace_all(block, {
                "py -3": f'"{sys.executable}" -B',
                "KEY=...": "KEY=" + self.box.user_key,
                "https://www.tofupilot.app": self.box.url})
            typed, _, task = block.partition("\nrem ")
            typed = typed.replace("schtasks", "rem")
            task = task.partition("\n")[2]
            for serial, text in (("SN-1", typed), ("SN-2", task)):
                self.ok(*create(serial), "--offline", "--queue", "line3.queue")
                lines = re.sub("(?m)(tofupilot_runs.*)$", "\\1\nif errorlevel 1 exit /b 9", text)
                self.file("lines.cmd", lines.replace("\n", "\r\n").encode("utf-8"))
                self.ended(self.popen("cmd", "/d", "/c", "lines.cmd"), 0)
            self.assertEqual(len(self.stored()), 3)
            self.assertIn(["a.png"], [self.attached(run_id) for run_id in self.stored()])
            self.assertIn(b"sent SN-2 PASS", content("send.log"))

    def test_the_example_body_can_be_sent_as_it_is(self):
        self.run_script("create", "--example", "--out", "run.json", status=0)
        self.run_script("create", "--body", "@run.json", status=0)
        self.assertEqual(len(self.stored()), 1)

    @unittest.skipUnless(importlib.util.find_spec("pytest"), "pytest is not installed")
    def test_the_pytest_hook_stores_a_run(self):
        self.module("conftest.py")
        self.file("test_unit.py", PYTEST_SAMPLE.encode())
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_unit.py"]
        ran = self.ended(self.popen(*words))
        self.assertEqual(ran.status, 1, ran)
        self.assertEqual(self.arrived(), {"SN-0001"})
        report = self.ok("get", "--serial-number", "SN-0001").out
        self.assertRegex(report, r"FAIL +test_unit.py::test_radio.*\n +note: assert 17.1 > 18\n")
        self.assertRegex(report, r"PASS +vcc +3.3\n")
        self.assertRegex(report, r"UNSET +tx_power +17.1\n")

    @unittest.skipUnless(importlib.util.find_spec("openhtf"), "openhtf is not installed")
    def test_the_openhtf_callback_stores_a_run_with_its_measurements(self):
        self.module("openhtf_report.py")
        sample = self.file("sample.py", OPENHTF_SAMPLE.encode())
        ran = self.ended(self.popen(sys.executable, sample))
        self.assertEqual(ran.status, 0, ran)
        self.assertEqual(self.arrived(), {"SN-0007"})
        report = self.ok("get", "--serial-number", "SN-0007", "--logs").out
        self.assertIn("vcc", report)
        self.assertNotIn("DEBUG", report)


def readme_text():
    return read_text(os.path.join(HERE, "README.md"))


# ---- demo ----------------------------------------------------------------------------------------

DEMO = """
check
runs create --outcome PASS --procedure-id proc_abc --serial-number SN-0001 --started-at \
2026-05-19T08:00:00Z --ended-at 2026-05-19T08:00:42Z
runs ls --procedure-ids proc_abc --outcomes PASS --limit 50
runs get --id run_abc123
runs update --id run_abc --attachments att_1 att_2
runs update-metadata --id run_abc --metadata '{"shift":"A","temp":23.4}'
runs create-attachment --id run_abc --name report.pdf
runs rm --ids run_a run_b
"""


def demo(argv):
    """The subcommands, each as a user types it, against a sandbox. Returns the exit status."""
    with tempfile.TemporaryDirectory() as folder, Sandbox(examples=True) as box:
        environment = clean_environment()
        environment.update(TOFUPILOT_URL=box.url, TOFUPILOT_API_KEY=box.user_key,
                           TOFUPILOT_HOME=folder)
        for line in DEMO.strip().splitlines():
            print(f"\n$ python3 tofupilot_runs.py {line}", flush=True)
            words = [sys.executable, SCRIPT] + shlex.split(line)
            status = subprocess.call(words, env=environment, stdin=subprocess.DEVNULL)
            if status:
                print(f"exit status {status}")
                return 1
    return 0


class Demo(unittest.TestCase):
    """The demo is a tour that works."""

    def test_it_shows_the_seven_subcommands_with_what_they_print(self):
        words = [sys.executable, "-B", os.path.abspath(__file__), "demo"]
        ran = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=clean_environment())
        text = text_of(ran.stdout)
        self.assertEqual(ran.returncode, 0, text)
        for word in ("ls", "get", "create", "update", "update-metadata", "create-attachment", "rm"):
            self.assertIn(f"\n$ python3 tofupilot_runs.py runs {word} ", text)
        self.assertNotIn("error", text)


# ---- bench ---------------------------------------------------------------------------------------

# A small process that starts the one to be measured: a child begins with its parent's peak.
LAUNCH = """import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print("usage", usage.ru_maxrss, usage.ru_utime + usage.ru_stime, status >> 8, file=sys.stderr)
sys.exit(status & 255)
"""
FLOOR = "import argparse, json"
BARE_LS = FLOOR + """, os, threading, urllib.request
request = urllib.request.Request(os.environ["API"] + "/v2/runs?limit=50", headers={
    "Authorization": "Bearer " + os.environ["KEY"]})
json.load(urllib.request.urlopen(request))
"""
BARE_CREATE = FLOOR + """, hashlib, os, sys, threading, urllib.request
body = json.loads(sys.argv[1])
body["client_run_ref"] = hashlib.sha256(sys.argv[1].encode()).hexdigest()
request = urllib.request.Request(os.environ["API"] + "/v2/runs", json.dumps(body).encode(), {
    "Authorization": "Bearer " + os.environ["KEY"], "Content-Type": "application/json"})
json.load(urllib.request.urlopen(request))
"""
BARE_PAGES = """import http.client, json, os, sys
connection = http.client.HTTPConnection(os.environ["API"].split("/")[2])
cursor = 0
while cursor is not None:
    connection.request("GET", "/api/v2/runs?limit=100&cursor=%d" % cursor, headers={
        "Authorization": "Bearer " + os.environ["KEY"]})
    page = json.loads(connection.getresponse().read())
    for row in page["data"]:
        sys.stdout.write(json.dumps(row) + "\\n")
    cursor = page["meta"]["next_cursor"] if page["meta"]["has_more"] else None
"""
BARE_BODY = """import hashlib, json, sys
body = json.loads(open(sys.argv[1], "rb").read().decode())
hashlib.sha256(json.dumps(body).encode()).hexdigest()
"""
PEER = """import os
from tofupilot.v2 import TofuPilot
peer = TofuPilot(api_key=os.environ["KEY"], server_url=os.environ["API"])
"""
PEER_LS = PEER + "peer.runs.list(limit=50)\n"
PEER_PAGES = PEER + """cursor = 0
while cursor is not None:
    meta = peer.runs.list(limit=100, cursor=cursor).meta
    cursor = meta.next_cursor if meta.has_more else None
"""
STORING = """import json, sqlite3, sys, time
import tofupilot_runs
body = json.loads(sys.argv[1])
db = sqlite3.connect("bare.db", isolation_level=None)
db.execute("PRAGMA synchronous = EXTRA")        # as durable as the queue
db.execute("CREATE TABLE run (body TEXT)")
ours, bare = [], []
for number in range(300):
    body["serial_number"] = "S-%d" % number
    started = time.perf_counter()
    tofupilot_runs.store(body, queue="store.queue")
    ours.append(time.perf_counter() - started)
    text = json.dumps(body)
    started = time.perf_counter()
    db.execute("INSERT INTO run VALUES (?)", (text,))
    bare.append(time.perf_counter() - started)
print(sorted(ours)[150], sorted(bare)[150], file=sys.stderr)
"""


def script_imports():
    """The modules that the script imports when it starts, as an import statement."""
    names = []
    for statement in ast.parse(content(SCRIPT).decode("utf-8")).body:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
    return "import " + ", ".join(names)


def clean_python(folder):
    """An interpreter without packages: what a site's .pth files import would flatter a ratio."""
    subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", folder])
    return os.path.join(folder, *(("bin", "python") if POSIX else ("Scripts", "python.exe")))


BY_PATH = "Python compiles the file at each start by its path; with -m it keeps it compiled"
COMPILED = "Python compiles a file that is started by its path, and does not give that memory back"


class Bench:
    """Measures in turns, and prints a row for each figure beside its bound.

    Of several turns the least time counts: whatever else the machine does can only add to it.
    """

    def __init__(self, box, folder, peer):
        self.box = box
        self.folder = folder
        self.peer = peer        # an interpreter with the official SDK, or None
        self.missed = 0
        self.python = clean_python(self.at("clean"))
        self.script = shutil.copy(SCRIPT, folder)
        self.module = [self.python, "-m", "tofupilot_runs"]
        self.path = [self.python, self.script]
        self.env = dict(clean_environment(), TOFUPILOT_HOME=folder, DISABLE_TELEMETRY="true")
        self.name_server(box)
        self.run(self.module + ["--version"])       # leaves the compiled copy

    def name_server(self, box, url=None):
        """From now on commands go to a sandbox, at this address of it."""
        url = url or box.url
        self.env.update(TOFUPILOT_URL=url, API=url + "/api", KEY=box.user_key,
                        TOFUPILOT_API_KEY=box.user_key)

    def at(self, name):
        return os.path.join(self.folder, name)

    # Measuring

    def row(self, what, value, bound, text, reason="not known yet: profile it"):
        """Prints a figure beside its bound, and where it misses the bound, why."""
        is_within = value <= bound
        verdict = "ok  " if is_within else "MISS"
        print(f"{what:<50} {value:7.2f}  {bound:5.2f}  {verdict}  {text}", flush=True)
        if not is_within:
            self.missed += 1
            print(f"    why: {reason}", flush=True)

    def skip(self, what, reason):
        print(f"{what:<50} not measured: {reason}", flush=True)

    def run(self, words):
        """The text of stderr of a process, which must succeed."""
        ran = subprocess.run(words, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        text = text_of(ran.stderr)
        if ran.returncode:
            raise SystemExit(f"{words} ended with {ran.returncode}: {text}")
        return text

    def seconds(self, words):
        started = time.perf_counter()
        self.run(words)
        return time.perf_counter() - started

    def usage(self, words, accepted=(0,)):
        """(peak of memory in MB, seconds of CPU) of a process that ends with such a status."""
        text = self.run([self.python, "-S", "-c", LAUNCH, *words])
        found = re.search(r"^usage (\d+) ([\d.]+) (\d+)$", text, re.M)
        if int(found.group(3)) not in accepted:
            raise SystemExit(f"{words} ended with {found.group(3)}: {text}")
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return int(found.group(1)) / unit, float(found.group(2))

    def cpu_seconds(self, words):
        """The time of the processor; where a system does not tell that of a child, all of it."""
        return self.usage(words)[1] if hasattr(os, "wait4") else self.seconds(words)

    def least(self, measure, ours, theirs, rounds):
        """The least figure of our words, and of theirs, in turns.

        `ours` may be a function that makes the words of a turn from its number.
        """
        figures = []
        for number in range(rounds):
            words = ours(number) if callable(ours) else ours
            figures.append((measure(words), measure(theirs)))
        return map(min, zip(*figures))

    def compare(self, what, bound, ours, theirs, reason, rounds=20):
        """Our time against theirs, from begin to end."""
        mine, other = self.least(self.seconds, ours, theirs, rounds)
        self.row(what, mine / other, bound, f"{1000 * mine:.0f} ms against {1000 * other:.0f} ms",
                 reason)

    def compare_cpu(self, what, bound, ours, theirs, reason, rounds=3):
        """The same with the time of the processor."""
        mine, other = self.least(self.cpu_seconds, ours, theirs, rounds)
        self.row(what, mine / other, bound,
                 f"{1000 * mine:.0f} ms against {1000 * other:.0f} ms of CPU", reason)

    def memory(self, what, bound, words, reason=COMPILED, accepted=(0,)):
        """The peak of a process, in MB."""
        what += ": memory"
        if not hasattr(os, "wait4"):
            self.skip(what, "this system does not tell the peak of a child")
            return
        started = time.perf_counter()
        peak, _ = self.usage(words, accepted)
        took = time.perf_counter() - started
        self.row(what, peak, bound, f"MB, in {took:.1f} s", reason)

    # The rows

    def starts(self):
        """What a start costs."""
        compiling = (f"{script_imports()}\n"
                     f"compile(open({self.script!r}, 'rb').read(), 'script', 'exec')")
        made = "the table of fields, the parser and the help are made"
        self.compare_cpu("--help by path / the same imports and compiling", 1.15,
                         self.path + ["--help"], [self.python, "-c", compiling], made, 10)
        self.compare_cpu("-m --help / import argparse, json", 1.4,
                         self.module + ["--help"], [self.python, "-c", FLOOR], made, 20)
        self.compare_cpu("-m create --offline / argparse, json, sqlite3", 1.5,
                         lambda number: self.module + create(f"S-{number}", "--offline"),
                         [self.python, "-c", FLOOR + ", sqlite3"],
                         "the table of fields and the parser are made, and a run is committed", 20)

    def requests(self):
        """What one request costs."""
        self.box.store.fill(1000)
        made = "the table of fields and the parser are made"
        self.compare("-m ls / the imports and one bare request", 1.25,
                     self.module + ["ls", "--json"], [self.python, "-c", BARE_LS], made)
        self.compare("-m create / the imports and one bare request", 1.25,
                     lambda number: self.module + create(f"C-{number}"),
                     [self.python, "-c", BARE_CREATE, json.dumps(BODY)], made)
        what = "one ls by path / the official SDK"
        if not self.peer:
            self.skip(what, "PEER_PYTHON names none")
            return
        compiled, bare = self.least(self.seconds, self.module + ["ls", "--json"],
                                    [self.python, "-c", BARE_LS], 5)
        self.compare(what, 0.2, self.path + ["ls", "--json"], [self.peer, "-c", PEER_LS],
                     "Python compiles the file at each start by its path; with -m, which keeps it "
                     f"compiled, it takes {1000 * compiled:.0f} ms, a bare request "
                     f"{1000 * bare:.0f} ms", 7)

    def pages(self):
        """All of 100,000 runs."""
        self.box.store.fill(100000, seed=1)
        what = "ls --all of 100,000 runs"
        words = ["ls", "--all", "--out", self.at("all"), "--format"]
        for form in runs.FORMATS:
            self.memory(f"{what}, -m, {form}", 40, self.module + words + [form])
        self.memory(f"{what}, by path", 40, self.path + words + ["table"])
        self.compare_cpu(f"{what}, -m / a keep-alive loop", 1.3,
                         self.module + ["ls", "--all", "--format", "jsonl"],
                         [self.python, "-c", BARE_PAGES],
                         "each page has a request object and two threads, four are parsed at once")

    def uploads(self):
        """A file of 1 GB."""
        big, queue = self.at("big.bin"), self.at("big.queue")
        with open(big, "wb") as file:
            for _ in range(1024):
                file.write(os.urandom(1 << 20))
        store, send = ["--offline", "--queue", queue], ["queue", "send", "--queue", queue]
        for start, shown, unit in ((self.module, "-m", "M"), (self.path, "by path", "P")):
            for what, words in (
                    ("1 GB up, direct", create(f"UP-{unit}", "--attach", big)),
                    ("1 GB into the queue", create(f"IN-{unit}", *store, "--attach", big)),
                    ("1 GB from the queue", send)):
                self.memory(f"{what}, {shown}", 40, start + words)
        os.unlink(big)
        os.unlink(queue)

    def full_queue(self):
        """A queue of 100,000 waiting runs; on a disk in memory where the system has one."""
        with tempfile.TemporaryDirectory("", "bench-", RAM) as folder:
            path, stick = [os.path.join(folder, name) for name in ("full.queue", "stick.queue")]
            ref = fill_queue(path, 100000)
            self.name_server(self.box, CLOSED)
            times, cpu_times = [], []
            for number in range(10):
                times.append(self.seconds(self.path + create(f"N-{number}", "--queue", path)))
                words = self.path + create(f"C-{number}", "--queue", path)
                cpu_times.append(self.cpu_seconds(words))
            self.row("100,000 waiting: create --queue, no server", min(times), 0.3,
                     f"s, by path, {min(cpu_times):.2f} s of it CPU",
                     "most of the CPU time compiles the file, which -m saves; the rest is waiting")
            for words in (create("OFF", "--offline"), ["queue", "ls"], ["queue", "ls", "--json"],
                          ["queue", "get", ref], ["check"], ["queue", "send"], ["queue", "retry"],
                          ["queue", "fix", ref, "--part-number", "P"],
                          ["queue", "rm", "--yes", ref]):
                self.queue_memory(path, words)
            self.name_server(self.box)
            self.queue_memory(path, ["queue", "move", stick])
            # It ends with 6: the creates above were stored for the server that is away.
            self.memory("100,000 sent: queue send", 60,
                        self.path + ["queue", "send", "--queue", stick], accepted=(6,))

    def queue_memory(self, path, words):
        """The peak of a command at a full queue, whether it does its work or fails."""
        shown = " ".join(words[:2]) if words[0] == "queue" else words[0]
        form = " --json" if "--json" in words else ""
        self.memory(f"100,000 waiting: {shown}{form}", 60, self.path + words + ["--queue", path],
                    accepted=(0, 5, 6))

    def round_trips(self):
        """A server that is 100 ms away."""
        with Sandbox() as box, DelayingProxy(box.url, 0.1) as proxy:
            box.store.fill(3000)
            self.name_server(box, proxy.url)
            what = "100 ms away: ls --all of 3,000 / the SDK's loop"
            if self.peer:
                self.compare(what, 0.4, self.path + ["ls", "--all", "--json"],
                             [self.peer, "-c", PEER_PAGES], BY_PATH, 3)
            else:
                self.skip(what, "PEER_PYTHON names none")
            times = []
            for number in range(2):
                queue = self.at(f"far-{number}.queue")
                fill_queue(queue, 200, f"FAR-{number}-")
                times.append(self.seconds(self.path + ["queue", "send", "--queue", queue]))
            self.row("100 ms away: queue send of 200 / 200 round trips", min(times) / 20, 0.3,
                     f"{min(times):.1f} s against 20 s",
                     "the first run goes alone, each of four lanes opens a connection")
        self.name_server(self.box)

    def large_bodies(self):
        """Requests with very many numbers."""
        for what, body in (("90,000 measurements", body_of_measurements(90000)),
                           ("a series of 1,000,000", body_of_series(1000000))):
            path = save(self.at("large.json"), json.dumps(body).encode())
            self.compare_cpu(f"create, {what} / load, dump, hash", 4,
                             self.path + ["create", "--body", "@" + path, "--timeout", "300"],
                             [self.python, "-c", BARE_BODY, path],
                             "the checks and the times in UTC look at each value in Python")

    def storing(self):
        """store() in a running program."""
        text = self.run([self.python, "-c", STORING, json.dumps(BODY)])
        mine, other = map(float, text.split()[-2:])
        self.row("store() / a bare SQLite commit of the same bytes", mine / other, 2,
                 f"{1000 * mine:.2f} ms against {1000 * other:.2f} ms, medians of 300",
                 "the queue is opened and closed for each run, and has two indexes to write")

    def kills(self):
        """A short form of `make trials`, which has 10,000."""
        for knows_ref in (False, True):
            trial = Trial(250, 21, knows_ref, time.time() + 120)
            wrong = trial.run()
            server = "new" if knows_ref else "old"
            self.row(f"{trial.kills} kills on an {server} server: lost or doubled".replace(
                "an new", "a new"), sum(wrong.values()), 0, f"of {len(trial.expected)} runs")

    def fleet(self):
        """200 stations after an outage."""
        figures = [run_fleet(seed=seed) for seed in range(7)]
        over_ideal, refused, peak = map(statistics.median, zip(*figures))
        self.row("200 stations: time to drain / the ideal", over_ideal, 1.5,
                 f"{refused:.0%} of requests refused, peak {peak:.0f}/s (simulated clock)")


PARTS = (Bench.starts, Bench.requests, Bench.pages, Bench.uploads, Bench.full_queue,
         Bench.round_trips, Bench.large_bodies, Bench.storing, Bench.kills, Bench.fleet)


def fill_queue(path, count, prefix="Q-"):
    """Stores runs in a queue file, in one transaction. Returns the ref of the last one."""
    with runs.Queue(path) as queue, queue.transaction():
        for number in range(count):
            body = dict(BODY, serial_number=f"{prefix}{number}")
            values = runs.entry_values(runs.with_ref(body))
            queue.insert("entry", state="waiting", stored_at=time.time(), **values)
    return values["ref"]


def body_of_measurements(count):
    """A request with so many measurements, a thousand in each phase."""
    phases = []
    for start in range(0, count, 1000):
        measurements = [{"name": f"m{number}", "outcome": "PASS", "measured_value": number / 7,
                         "units": "V", "validators": [{"operator": "<=", "expected_value": count}]}
                        for number in range(start, start + 1000)]
        phases.append({"name": f"phase {start}", "outcome": "PASS", "started_at": BEGIN,
                       "ended_at": END, "measurements": measurements})
    return dict(BODY, phases=phases)


def body_of_series(points):
    """A request with a measurement that has so many points."""
    gain = {"name": "gain", "outcome": "PASS",
            "x_axis": {"name": "t", "units": "s", "data": [n / 1000 for n in range(points)]},
            "y_axis": [{"name": "u", "units": "V", "data": [n / 7 for n in range(points)]}]}
    phase = {"name": "sweep", "outcome": "PASS", "started_at": BEGIN, "ended_at": END,
             "measurements": [gain]}
    return dict(BODY, phases=[phase])


def bench(argv):
    """Prints the figures, each taken in this one run. Returns 0, also where a bound is missed.

    Words choose parts of it: starts requests pages uploads full_queue round_trips large_bodies
    storing kills fleet.
    """
    parts = [part for part in PARTS if not argv or part.__name__ in argv]
    peer = os.environ.get("PEER_PYTHON")
    print(f"{platform.platform()}, {os.cpu_count()} processors, Python "
          f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}")
    version = "not here, PEER_PYTHON= names a Python that has it"
    if peer:
        told = subprocess.check_output([peer, "-m", "pip", "show", "tofupilot"])
        version = re.search(r"^Version: (\S+)", text_of(told), re.M).group(1)
    print(f"the official SDK: {version}")
    print(f"{'':50}  figure  bound", flush=True)
    with tempfile.TemporaryDirectory("", "bench-") as folder, Sandbox() as box:
        box.keep = False
        table = Bench(box, folder, peer)
        for part in parts:
            part(table)
    print(f"{table.missed} rows miss their bound")
    return 0


# ---- the runner ----------------------------------------------------------------------------------

PYTHONS = ["3.6", "3.7", "3.8", "3.9", "3.10", "3.11", "3.12", "3.13"]
CLASS_TIMEOUT = 600         # seconds for one class of tests
MARK = "@@result "          # what the last line of a class's process begins with


def test_classes():
    """The names of all classes of tests; those that take long come first."""
    names = []
    for name, item in globals().items():
        is_class = isinstance(item, type) and issubclass(item, unittest.TestCase)
        if is_class and not name.endswith("Case"):
            names.append(name)
    slow = [name for name in names if getattr(globals()[name], "is_slow", False)]
    return sorted(slow) + sorted(set(names) - set(slow))


class Result(unittest.TextTestResult):
    """Which tests passed, failed and were skipped. One with several sub-tests counts once."""

    def __init__(self, *args):
        super().__init__(*args)
        self.started, self.failed = set(), set()
        self.reasons = {}       # test: why it was skipped

    def startTest(self, test):
        super().startTest(test)
        self.started.add(test.id())

    def addError(self, test, error):
        super().addError(test, error)
        self.failed.add(test.id())

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.failed.add(test.id())

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.failed.add(test.id())

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.failed.add(test.id())

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.reasons[test.id()] = reason

    def counts(self):
        """{"passed", "failed", "skipped", "reasons": {name of a test: why it was skipped}}."""
        skipped = set(self.reasons) - self.failed
        reasons = {}
        for name in sorted(skipped):
            short = name.rpartition(".")[2]
            reasons[short] = self.reasons[name]
        return {
            "passed": len(self.started - self.failed - skipped),
            "failed": len(self.failed),
            "skipped": len(skipped),
            "reasons": reasons,
        }


def run_class(argv):
    """Runs one class, or one test of it, in this process. Its last line has the counts."""
    suite = unittest.defaultTestLoader.loadTestsFromName(argv[0], sys.modules[__name__])
    runner = unittest.TextTestRunner(sys.stdout, resultclass=Result)
    counts = runner.run(suite).counts()
    print(MARK + json.dumps(counts), flush=True)
    return 1 if counts["failed"] else 0


class ClassRun:
    """A process that runs one class of tests; what it writes goes to a file."""

    def __init__(self, name, python):
        self.name = name
        self.started = time.monotonic()
        self.output = tempfile.TemporaryFile()
        environment = dict(os.environ, PYTHONIOENCODING="utf-8")
        self.process = subprocess.Popen(
            [python, "-B", "-X", "dev", "-W", "error", os.path.abspath(__file__), "run-class",
             name], stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
            env=environment)

    def is_over(self):
        if time.monotonic() - self.started > CLASS_TIMEOUT:
            self.process.kill()
        return self.process.poll() is not None

    def finish(self):
        """(what it wrote, its counts). A process without counts has failed as a whole."""
        self.seconds = time.monotonic() - self.started
        self.output.seek(0)
        written = text_of(self.output.read())
        self.output.close()
        text, _, rest = written.rpartition(MARK)
        try:
            counts = rest.partition("\n")[0]    # Python may still warn when it ends
            return text, json.loads(counts)
        except ValueError:
            status = self.process.returncode
            text = f"{written}\n{self.name} ended with {status}, unfinished"
            return text, {"passed": 0, "failed": 1, "skipped": 0, "reasons": {}}

    def stop(self):
        """Ends the process: as Ctrl-C does where that can be sent, so that it cleans up."""
        if POSIX:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process.kill()
        self.process.wait()
        self.output.close()


def count_text(counts):
    """12 passed, 0 failed, 1 skipped."""
    text = "{passed} passed, {failed} failed".format(**counts)
    if counts["skipped"]:
        text += ", {skipped} skipped".format(**counts)
    return text


def tell(run):
    """Prints what a class that is over did. Returns its counts."""
    text, counts = run.finish()
    reasons = counts.pop("reasons")
    print(f"{run.name:<28} {run.seconds:6.1f} s  {count_text(counts)}", flush=True)
    for name, reason in reasons.items():
        print(f"    skipped: {name}: {reason}", flush=True)
    if counts["failed"]:
        print(text, flush=True)
    return counts


def run_classes(names, python):
    """Runs classes with one Python, two or more at a time, a line for each. Returns the counts."""
    totals = collections.Counter(passed=0, failed=0)
    waiting = collections.deque(names)
    running = []
    width = max(2, os.cpu_count() or 1)
    try:
        while waiting or running:
            while waiting and len(running) < width:
                running.append(ClassRun(waiting.popleft(), python))
            for run in running[:]:
                if run.is_over():
                    running.remove(run)
                    totals.update(tell(run))
            time.sleep(0.02)
    finally:
        for run in running:
            run.stop()
    return totals


def version_of(python):
    """The version of an interpreter, such as 3.9.18."""
    words = subprocess.check_output([python, "-V"], stderr=subprocess.STDOUT)
    return words.decode().split()[1]


def find_pythons():
    """An interpreter for each version from 3.6 to 3.13 that is here, the one at hand among them."""
    this_one = "{}.{}".format(*sys.version_info)
    folders = os.environ.get("PATH", "").split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if "shims" not in folder)
    found = [] if this_one in PYTHONS else [sys.executable]
    for name in PYTHONS:
        pattern = os.path.join(PYENV, "versions", name + ".*", "bin", "python")
        places = sorted(glob.glob(pattern))
        on_path = shutil.which("python" + name, path=path)
        if name == this_one:
            places = [sys.executable]
        elif on_path:
            places.insert(0, on_path)
        places = [place for place in places if os.access(place, os.X_OK)]
        found += places[:1]
    return found


def test(argv):
    """Runs the tests: all classes, or those that are named (CLASS or CLASS.test_name).

    --all runs them with every Python from 3.6 to 3.13 that is on the PATH or in pyenv's folder.
    """
    names = [word for word in argv if word != "--all"]
    known = test_classes()
    for name in names:
        if name.partition(".")[0] not in known:
            print(f"there is no class {name}; these are:", *known)
            return 2
    pythons = find_pythons() if "--all" in argv else [sys.executable]
    totals = collections.Counter(passed=0, failed=0)
    try:
        for python in pythons:
            started = time.monotonic()
            version = version_of(python)
            print(f"Python {version}", flush=True)
            counts = run_classes(names or known, python)
            totals.update(counts)
            took = time.monotonic() - started
            print(f"Python {version}: {count_text(counts)} in {took:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C")
        return 130
    print(count_text(totals), flush=True)
    return 1 if totals["failed"] else 0


class Runner(unittest.TestCase):
    """The runner counts what it ran."""

    def counts_of(self, *tests):
        """The counts of a class with these tests, as text."""
        methods = {f"test_{number}": test for number, test in enumerate(tests)}
        made = type("Made", (unittest.TestCase,), methods)
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(made)
        runner = unittest.TextTestRunner(io.StringIO(), resultclass=Result)
        return count_text(runner.run(suite).counts())

    def test_a_test_counts_once_whatever_it_does(self):
        """Control: a count of failures has two for the one with sub-tests."""
        def passes(test):
            pass

        def fails(test):
            test.fail()

        def fails_twice(test):
            for number in range(2):
                with test.subTest(number=number):
                    test.fail()

        def is_skipped(test):
            test.skipTest("why")

        counts = self.counts_of(passes, fails, fails_twice, is_skipped)
        self.assertEqual(counts, "1 passed, 2 failed, 1 skipped")
        self.assertEqual(self.counts_of(passes, passes), "2 passed, 0 failed")

    def test_a_class_that_breaks_off_has_failed(self):
        """Control: a process without counts that is taken for one without failures."""
        run = SimpleNamespace(name="Gone", started=0, output=io.BytesIO(b"half a report"),
                              process=SimpleNamespace(returncode=1))
        text, counts = ClassRun.finish(run)
        self.assertEqual(count_text(counts), "0 passed, 1 failed")
        self.assertIn("half a report", text)

    def test_what_python_says_at_its_end_is_none_of_the_counts(self):
        """Control: read all that follows the mark."""
        counts = {"passed": 2, "failed": 0, "skipped": 0, "reasons": {}}
        written = MARK + json.dumps(counts) + "\nResourceWarning: unclosed socket\n"
        run = SimpleNamespace(started=0, output=io.BytesIO(written.encode()))
        self.assertEqual(ClassRun.finish(run), ("", counts))


# ---- main ----------------------------------------------------------------------------------------

TOOLS = {
    "test": test,
    "serve": serve,
    "sandbox": lambda argv: serve(argv + ["--examples"]),
    "demo": demo,
    "trials": trials,
    "bench": bench,
    "run-class": run_class,
}


def main():
    name, *argv = sys.argv[1:] or ["test"]
    if name not in TOOLS:
        print("usage: test_tofupilot_runs.py [test | demo | serve | sandbox | bench | trials]")
        return 2
    # A shell that starts this with & has Ctrl-C ignored, and the script would heed that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return TOOLS[name](argv)


if __name__ == "__main__":
    sys.exit(main())
