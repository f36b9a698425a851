#!/usr/bin/env python3
"""Tests of tofupilot_runs, and the sandbox that they run against.

The sandbox is a strict local server that behaves like the TofuPilot v2 REST API for runs and
attachments. It needs nothing but Python 3.6 or newer, keeps its data in one SQLite database, and
can be read to learn the API: schema has the fields and parameters of each operation and what get
makes of them, store what each operation does, http the routes, the order of the checks, the error
bodies, the storage behind upload URLs, and faults.

    python3 test_tofupilot_runs.py                  the tests, a process for each class of them
    python3 test_tofupilot_runs.py test CLASS ...   some of them
    python3 test_tofupilot_runs.py serve --help     the sandbox, until Ctrl-C
    python3 test_tofupilot_runs.py demo             each subcommand against a sandbox
    python3 test_tofupilot_runs.py trials --help    random kills and faults, 10,000 of them
    python3 test_tofupilot_runs.py bench            the figures of the README
"""
import argparse
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
import random
import re
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import uuid
import warnings
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlsplit
from unittest import mock
from urllib.request import ProxyHandler, Request as WebRequest, build_opener, urlopen


# ---- sandbox: schema -----------------------------------------------------------------------------
# A kind is a function kind(check, path, value): it returns the value as the store wants it, and
# tells check.fail what is wrong. Tables of (name, kind, rule) make the objects: R is required,
# O optional, N optional or null, X forbidden. Times and durations become milliseconds.

RUN_OUTCOMES = ("PASS", "FAIL", "ERROR", "TIMEOUT", "ABORTED")
MAX_KEYS, MAX_FILTER_KEYS, MAX_VALUE, MAX_MESSAGE, MAX_SOURCE_FILE = 50, 5, 50000, 10000, 200
SAFE_INTEGER, DEFAULT_REVISION = 2 ** 53 - 1, "A"
IDENTIFIER = re.compile(r"[a-zA-Z0-9_.:+-]{1,60}")
KEY = re.compile(r"[a-zA-Z0-9_.:+-]{1,40}")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I)
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.I)
RADIX = re.compile(r"0(x[0-9a-f]+|o[0-7]+|b[01]+)", re.I)
TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d)(?::(\d\d)(?:\.(\d+))?)?"
                  r"(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))", re.A)
DURATION = re.compile(r"P(?:(\d+)W|(?!.*W)(?=\d|T\d)(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)D)?"
                      r"(?:T(?=\d)(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:[.,]\d+)?)S)?)?)", re.A)
DURATION_UNITS = (604800, 31536000, 2592000, 86400, 3600, 60, 1)
EPOCH, MILLISECOND = datetime.datetime(1970, 1, 1), datetime.timedelta(milliseconds=1)


def parse_time(text):
    """'1970-01-01T01:00:01.2345+01:00' -> 1234, cut to milliseconds as JavaScript does."""
    *date, fraction, sign, hours, minutes = TIME.fullmatch(text).groups()
    offset = datetime.timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    moment = datetime.datetime(*(int(part or 0) for part in date))
    moment += offset if sign == "-" else -offset
    return (moment - EPOCH) // MILLISECOND + int((fraction or "0")[:3].ljust(3, "0"))


def parse_duration(text):
    """'PT2M30.5S' -> 150500; a year has 365 days, a month 30."""
    parts = DURATION.fullmatch(text).groups(default="0")
    return min(SAFE_INTEGER, round(1000 * sum(float(part.replace(",", ".")) * seconds for
                                              part, seconds in zip(parts, DURATION_UNITS))))


def show_time(moment):
    """1234 -> '1970-01-01T00:00:01.234Z'."""
    return moment if moment is None else (
        EPOCH + moment * MILLISECOND).isoformat(timespec="milliseconds") + "Z"


def show_span(thing):
    """The start, end and duration of a run, phase or sequence; 150000 ms are 'PT2M30S'."""
    started_at, ended_at, text = thing.get("started_at"), thing.get("ended_at"), None
    if started_at is not None and ended_at is not None:
        minutes, rest = divmod(ended_at - started_at, 60000)
        hours, minutes = divmod(minutes, 60)
        days, hours = divmod(hours, 24)
        seconds = rest and f"{rest / 1000:g}"
        date, *clock = (f"{n}{unit}" if n else "" for n, unit in
                        ((days, "D"), (hours, "H"), (minutes, "M"), (seconds, "S")))
        clock = "".join(clock) or ("" if date else "0S")
        text = f"P{date}T{clock}" if clock else f"P{date}"
    return {"started_at": show_time(started_at), "ended_at": show_time(ended_at), "duration": text}


def js_number(value):
    """What JavaScript's Number() makes of a text: '' is 0, '0x10' 16; no number: as it is."""
    text = value.strip() if isinstance(value, str) else "-"
    number = int(text, 0) if RADIX.fullmatch(text) else value if text else 0
    return float(text) if DECIMAL.fullmatch(text) else number


def load_json(text):
    """json.loads without NaN and Infinity, and with texts and integers that SQLite can store."""
    value = json.loads(text, parse_constant=int,  # int("NaN") is a ValueError
                       parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    if "\\ud" in text.lower():  # half of a surrogate pair is no text
        json.dumps(value, ensure_ascii=False).encode()
    return value


def type_name(value):
    """string, number or boolean; None for anything else, also for NaN and the infinities."""
    if isinstance(value, (bool, str)):
        return "boolean" if isinstance(value, bool) else "string"
    return "number" if isinstance(value, (int, float)) and math.isfinite(value) else None


def is_list_of(name, value):
    return isinstance(value, list) and all(type_name(element) == name for element in value)


class Check:
    """Collects the issues of a request; knows(table, id) tells whether the store has a row."""

    def __init__(self, knows):
        self.issues, self.knows = [], knows

    def fail(self, path, code, problem):
        """Each message names its field as phases[0].name; serial_number as serial number."""
        name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
        name = re.sub("^([a-z]+)_number$", r"\1 number", name)
        self.issues.append({"code": code, "path": list(path), "message": f"{name} {problem}"})


def kind(parse, problem, code="invalid_type"):
    """The kind of which parse(value) makes what is stored; if it fails or is None: refused."""
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
    """The kind of the values of which holds(value) is true."""
    return kind(lambda value: value if holds(value) else None, problem, code)


string = only(lambda v: isinstance(v, str), "must be a string")
strings = only(lambda v: isinstance(v, str) or is_list_of("string", v), "must be text or texts")
filled = only(lambda v: v.strip(), "is Too small: at least 1 character is needed", "too_small")
file_name = only(lambda v: 1 <= len(v + "") <= 255, "must be 1 to 255 characters", "too_big")
identifier = kind(lambda v: IDENTIFIER.fullmatch(v.strip()).group(),
                  "must be 1 to 60 characters of a-z A-Z 0-9 _ . : + -", "invalid_format")
searched = kind(lambda v: v.lower(), "must be a string")
number = only(lambda v: type_name(v) == "number", "must be a finite number")
boolean = only(lambda v: isinstance(v, bool), "must be a boolean")
flag = kind({"true": True, "1": True, "false": False, "0": False}.get, "must be a boolean")
scalar = only(type_name, "must be a string, a finite number or a boolean")
entry = only(lambda v: type_name(v) and len(str(v)) <= MAX_VALUE,
             f"must be text of at most {MAX_VALUE} characters, a finite number or a boolean")
any_json = only(lambda v: json.dumps(v, allow_nan=False), "must hold finite numbers only")
moment = kind(parse_time, "must be an ISO 8601 datetime with an offset", "invalid_format")
duration = kind(parse_duration, "must be an ISO 8601 duration", "invalid_format")


def enum(*words):
    return only(lambda v: v in words, "must be one of " + ", ".join(words), "invalid_value")


def integer(least=-SAFE_INTEGER, most=SAFE_INTEGER, read=lambda value: value):
    def parse(value):
        exact = int(read(value)) if type_name(read(value)) == "number" else None
        return exact if exact == read(value) and least <= exact <= most else None
    return kind(parse, f"must be an integer from {least} to {most}")


def uuid_of(table):
    """A UUID in any case, or an ID that the table has (the sandbox's own, such as proc_abc)."""
    def checked(check, path, value):
        if isinstance(value, str) and UUID.fullmatch(value):
            return value.lower()
        if not isinstance(value, str) or not check.knows(table, value):
            check.fail(path, "invalid_format", "must be a valid UUID")
        return value
    return checked


def array(item, query=False):
    """A list; in a query one value arrives as its text, only a repeated one as a list."""
    def checked(check, path, value):
        values = [value] if query and isinstance(value, str) else value
        if not isinstance(values, list):
            check.fail(path, "invalid_type", "must be an array")
            return []
        return [item(check, path + (i,), element) for i, element in enumerate(values)]
    return checked


many = functools.partial(array, query=True)


def record(*fields):
    """An object of the given fields; other fields are ignored, absent and null ones left out."""
    def checked(check, path, value):
        if not isinstance(value, dict):
            check.fail(path, "invalid_type", "must be an object")
            return {}
        clean = {}
        for name, field, rule in fields:
            here = path + (name,)
            if name not in value:
                if rule == "R":
                    check.fail(here, "invalid_type", "is required")
            elif rule == "X":
                check.fail(here, "unrecognized_keys", "must not be sent")
            elif value[name] is not None:
                clean[name] = field(check, here, value[name])
            elif rule != "N":
                check.fail(here, "invalid_type", "must not be null")
        started_at, ended_at = clean.get("started_at"), clean.get("ended_at")
        if None not in (started_at, ended_at) and ended_at < started_at:
            check.fail(path + ("ended_at",), "custom", "must not be before started_at")
        return clean
    return checked


def metadata(null):
    """Custom keys and scalar values; with null=True a null stands for "delete this key"."""
    def checked(check, path, value):
        if not isinstance(value, dict) or len(value) > MAX_KEYS:
            check.fail(path, "too_big", f"must be an object of at most {MAX_KEYS} keys")
            return {}
        for key in value:
            if not KEY.fullmatch(key):
                problem = "must be a key of 1 to 40 characters of a-z A-Z 0-9 _ . : + -"
                check.fail(path + (key,), "invalid_key", problem)
            if not null or value[key] is not None:
                entry(check, path + (key,), value[key])
        return value
    return checked


OPERATORS = {  # of the metadata filter: (operator, type of its value), SQL
    ("in", "list"): "value IN ({})", ("contains", "string"): "instr(lower(value), lower(?)) > 0",
    ("gte", "number"): "value >= ?", ("lte", "number"): "value <= ?",
    ("gt", "number"): "value > ?", ("lt", "number"): "value < ?",
    ("eq", "number"): "value = ?", ("eq", "boolean"): "value = ?"}


def metadata_filter(check, path, text):
    """'{"shift": {"in": ["A", "B"]}}' -> [(key, {type}, [(SQL, values)])]."""
    try:
        wanted = load_json(text or "{}")
    except (TypeError, ValueError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict) or len(wanted) > MAX_FILTER_KEYS:
        check.fail(path, "custom", f"must be a JSON object of at most {MAX_FILTER_KEYS} keys")
        return []
    clean = []
    for key, operators in wanted.items():
        types, tests = set(), []
        for name, value in operators.items() if isinstance(operators, dict) else ():
            listed = is_list_of("string", value)
            sql = OPERATORS.get((name, "list" if listed else type_name(value)))
            types.add(sql and ("string" if listed else type_name(value)))
            tests.append((sql, value if listed else [value]))
        if len(types) != 1 or None in types:
            problem = 'must have operators of one type, such as {"in": ["A"]} or {"gte": 1}'
            check.fail(path + (key,), "invalid_type", problem)
        clean.append((key, types, tests))
    return clean


RUN_OUTCOME = enum(*RUN_OUTCOMES)
VERDICT = ("outcome", enum("PASS", "FAIL", "UNSET"), "N")
VALIDATORS = ("validators", array(record(
    VERDICT, ("operator", string, "N"), ("expected_value", any_json, "N"),
    ("expression", string, "N"), ("is_decisive", boolean, "N"))), "N")
AGGREGATIONS = ("aggregations", array(record(
    ("type", string, "R"), VERDICT, ("value", scalar, "N"), ("unit", string, "N"), VALIDATORS)),
    "N")
AXIS = record(
    ("data", array(number), "R"), ("units", string, "N"), ("name", string, "N"),
    ("description", string, "N"), VALIDATORS, AGGREGATIONS)
MEASUREMENT = record(
    ("name", string, "R"), VERDICT[:2] + ("R",), ("measured_value", any_json, "N"),
    ("units", strings, "N"), ("x_axis", AXIS, "N"), ("y_axis", array(AXIS), "N"),
    ("lower_limit", number, "O"), ("upper_limit", number, "O"), ("docstring", string, "N"),
    VALIDATORS, AGGREGATIONS)
PHASE = record(
    ("name", string, "R"), ("outcome", enum("PASS", "FAIL", "SKIP", "ERROR"), "R"),
    ("started_at", moment, "R"), ("ended_at", moment, "R"), ("docstring", string, "N"),
    ("measurements", array(MEASUREMENT), "N"), ("retry_count", integer(0), "O"),
    ("sequence_path", string, "N"))
SEQUENCE = record(
    ("path", filled, "R"), ("name", string, "R"), ("outcome", enum(*RUN_OUTCOMES, "SKIP"), "R"),
    ("source", string, "N"), ("started_at", moment, "N"), ("ended_at", moment, "N"))
LOG = record(
    ("level", enum("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "R"),
    ("timestamp", moment, "R"), ("message", string, "R"), ("source_file", string, "R"),
    ("line_number", integer(), "R"))
VARIABLE = (
    ("key", string, "R"), ("variable_id", string, "N"), ("version", integer(), "N"),
    ("source", enum("default", "shell", "dotenv", "process", "station", "procedure",
                    "organization"), "N"))
CREATE_RULES = (
    ("outcome", RUN_OUTCOME, "R"), ("procedure_id", uuid_of("procedures"), "R"),
    ("started_at", moment, "R"), ("ended_at", moment, "R"), ("serial_number", identifier, "R"),
    ("deployment_id", string, "N"), ("client_run_ref", filled, "O"), ("execution_id", string, "N"),
    ("slot_key", string, "N"), ("slot_name", string, "N"), ("procedure_version", identifier, "N"),
    ("operated_by", filled, "O"), ("part_number", identifier, "O"),
    ("revision_number", identifier, "O"), ("batch_number", identifier, "O"),
    ("sub_units", array(identifier), "O"), ("docstring", string, "O"),
    ("phases", array(PHASE), "O"), ("sequences", array(SEQUENCE), "N"), ("logs", array(LOG), "O"),
    ("metadata", metadata(null=False), "O"), ("unit_metadata", metadata(null=False), "O"),
    ("config", array(record(("value", scalar, "R"), *VARIABLE)), "O"),
    ("secrets", array(record(("value", scalar, "X"), *VARIABLE)), "O"))
FILTERS = (  # parameter, kind, and its SQL; of a list the column that is IN it
    ("search_query", string,
     "(instr(unit.key, lower(?)) > 0 OR substr(run.id, 1, length(?)) = lower(?))"),
    ("ids", many(uuid_of("runs")), "run.id"), ("outcomes", many(RUN_OUTCOME), "run.outcome"),
    ("procedure_ids", many(uuid_of("procedures")), "run.procedure_id"),
    ("procedure_versions", many(searched), "version.key"),
    ("deployment_ids", many(uuid_of("deployments")), "run.deployment_id"),
    ("environments", many(enum("production", "preview", "development")), "deployment.environment"),
    ("execution_ids", many(string), "run.execution_id"),
    ("slot_keys", many(string), "run.slot_key"), ("slot_names", many(string), "run.slot_name"),
    ("serial_numbers", many(searched), "unit.key"), ("part_numbers", many(searched), "part.key"),
    ("revision_numbers", many(searched), "revision.key"),
    ("batch_numbers", many(searched), "batch.key"),
    ("samples", many(enum("production", "golden", "failing", "ignored")),
     "coalesce(unit.sample, 'production')"),
    ("duration_min", duration, "run.ended_at - run.started_at >= ?"),
    ("duration_max", duration, "run.ended_at - run.started_at <= ?"),
    *((f"{name}_{side}", moment, f"run.{name}_at {sign} ?") for name in
      ("started", "ended", "created") for side, sign in (("after", ">="), ("before", "<="))),
    ("created_by_user_ids", many(uuid_of("accounts")), "run.user_id"),
    ("created_by_station_ids", many(uuid_of("accounts")), "run.station_id"),
    ("operated_by_ids", many(uuid_of("accounts")), "run.operator_id"),
    ("operated_by_names", many(string), "coalesce(operator.name, run.operator_name)"))
SORTS = {
    "started_at": "run.started_at", "created_at": "run.created_at", "outcome": "run.outcome",
    "duration": "run.ended_at - run.started_at", "serial_number": "unit.key",
    "part_number": "part.key", "revision_number": "revision.key"}
LIST = tuple((name, field, "O") for name, field, _ in FILTERS) + (
    ("limit", integer(1, 100, js_number), "O"), ("cursor", integer(0, read=js_number), "O"),
    ("sort_by", enum(*SORTS), "O"), ("sort_order", enum("asc", "desc"), "O"),
    ("metadata", metadata_filter, "O"), ("include_metadata", flag, "O"),
    ("include_sequences", flag, "O"))


def across_fields(check, run):
    """The rules of create that concern several fields; run is what the kinds made of the body."""
    for name, needed in (("slot_key", "execution_id"), ("slot_name", "slot_key")):
        if name in run and needed not in run:
            check.fail((name,), "custom", f"requires {needed}")
    paths = [sequence.get("path") or "" for sequence in run.get("sequences", ())]
    for i, path in enumerate(paths):
        if path in paths[:i] or "/" in path and path.rpartition("/")[0] not in paths:
            check.fail(("sequences", i, "path"), "custom", "is there twice, or lacks its parent")
    for i, phase in enumerate(run.get("phases", ())):
        if phase.get("sequence_path") not in [None, *paths]:
            check.fail(("phases", i, "sequence_path"), "custom", "must name a path of sequences")


# What create took, in the form in which get gives it back.

def new_id(): return str(uuid.uuid4())
def pick(thing, *names): return {name: thing.get(name) for name in names}


def show_validator(validator):
    """Operator and value make an expression, unless the value is an object or a mixed list."""
    operator, value, custom = pick(validator, "operator", "expected_value", "expression").values()
    generated, numbers = None, is_list_of("number", value)
    if not (value is None or type_name(value) or numbers or is_list_of("string", value)):
        custom = custom or json.dumps(value, separators=(",", ":"))
        operator = value = None
    elif operator is not None or value is not None:
        exact = [float(v) for v in value] if numbers else value
        exact = float(value) if type_name(value) == "number" else exact
        generated = f"x {operator or '=='} {'' if value is None else repr(exact)}".strip()
    return {
        "outcome": validator.get("outcome", "UNSET"), "operator": operator,
        "expected_value": value, "expression": (generated or "") if custom is None else custom,
        "is_decisive": validator.get("is_decisive", True), "is_expression_only": generated is None,
        "analytics_expression": generated, "has_custom_expression": None not in (generated, custom)}


def show_checks(owner):
    """Validators of a measurement, axis or aggregation, deprecated limits too; aggregations."""
    validators, value = list(owner.get("validators", ())), owner.get("measured_value")
    for name, operator, sign in (("upper_limit", "<=", -1), ("lower_limit", ">=", 1)):
        if name in owner:
            limit, outcome = owner[name], "UNSET"
            if type_name(value) == "number":
                outcome = "PASS" if sign * value >= sign * limit else "FAIL"
            validators.insert(0, dict(operator=operator, expected_value=limit, outcome=outcome))
    aggregations = [dict(pick(aggregation, "type", "outcome", "value", "unit"), id=new_id(),
                         validators=show_checks(aggregation)["validators"])
                    for aggregation in owner.get("aggregations", ())]
    return {"validators": [show_validator(validator) for validator in validators] or None,
            "aggregations": aggregations or None}


def show_measurement(measurement):
    """Several dimensions come as data_series, any other value as measured_value and units."""
    shown = dict(pick(measurement, "name", "outcome"), id=new_id(), **show_checks(measurement))
    value, units = measurement.get("measured_value"), measurement.get("units")
    axes = [measurement["x_axis"]] if "x_axis" in measurement else []
    axes += measurement.get("y_axis", [])
    if not axes and isinstance(value, list) and all(is_list_of("number", row) for row in value):
        if len({len(row) for row in value}) == 1:  # the legacy form: [[x, y], ...]
            names = units if isinstance(units, list) else [units]
            axes = [{"data": list(column), "units": names[i] if i < len(names) else None}
                    for i, column in enumerate(zip(*value))]
    if not axes:
        units = ", ".join(units) if isinstance(units, list) else units
        return dict(shown, units=units, measured_value=value)
    return dict(shown, data_series=[
        dict(pick(axis, "data", "units", "name", "description"), **show_checks(axis))
        for axis in axes])


def show_details(run):
    """What get shows beyond the row of a list and what never changes, as a dict."""
    variable, sequences, phases, logs = ("key", "variable_id", "version", "source"), [], [], []
    for sequence in sorted(run.get("sequences", ()), key=lambda sequence: (
            sequence["path"].count("/"), sequence.get("started_at", SAFE_INTEGER))):
        parent, _, key = sequence["path"].rpartition("/")
        sequences.append(dict(pick(sequence, "path", "name", "source", "outcome"), id=new_id(),
                              key=key, parent_path=parent or None, **show_span(sequence)))
    for phase in sorted(run.get("phases", ()), key=lambda phase: (
            phase["started_at"], phase["name"], phase.get("retry_count", 0))):
        phases.append(dict(
            pick(phase, "name", "outcome", "sequence_path", "docstring"), **show_span(phase),
            id=new_id(), retry_count=phase.get("retry_count", 0),
            measurements=[show_measurement(m) for m in phase.get("measurements", ())]))
    for log in sorted(run.get("logs", ()), key=lambda log: log["timestamp"]):
        logs.append(dict(  # texts too long or empty are repaired; of a path the end says most
            pick(log, "level", "line_number"), id=new_id(), timestamp=show_time(log["timestamp"]),
            message=log["message"][:MAX_MESSAGE] or "(empty)",
            source_file=log["source_file"][-MAX_SOURCE_FILE:] or "unknown"))
    return {"config": [pick(entry, "value", *variable) for entry in run.get("config", ())],
            "secrets": [pick(entry, *variable) for entry in run.get("secrets", ())],
            "phases": phases, "sequences": sequences, "logs": logs}


# ---- sandbox: store ------------------------------------------------------------------------------

TABLES = """BEGIN;
CREATE TABLE settings (name PRIMARY KEY, value);
CREATE TABLE accounts (id PRIMARY KEY, type, name, email, role, key UNIQUE);
CREATE TABLE procedures (id PRIMARY KEY, name, linked);
CREATE TABLE deployments (id PRIMARY KEY, procedure_id, environment);
CREATE TABLE numbers (id PRIMARY KEY, kind, scope, key, number, UNIQUE (key, kind, scope));
CREATE TABLE units (id PRIMARY KEY, number, key UNIQUE, part_id, sample, parent_id, metadata);
CREATE TABLE runs (n INTEGER PRIMARY KEY, id UNIQUE, created_at, started_at, ended_at, outcome,
    procedure_id, version_id, deployment_id, unit_id, part_id, revision_id, batch_id, execution_id,
    slot_key, slot_name, docstring, user_id, station_id, operator_id, operator_name,
    client_run_ref UNIQUE, digest, details, UNIQUE (execution_id, slot_key));
CREATE INDEX runs_started ON runs (started_at, id, procedure_id);
CREATE INDEX runs_created ON runs (created_at, id, procedure_id);
CREATE INDEX runs_unit ON runs (unit_id);
CREATE INDEX runs_part ON runs (part_id);
CREATE TABLE metadata (run_n, key, type, value, PRIMARY KEY (run_n, key));
CREATE TABLE sub_units (run_n, unit_id, PRIMARY KEY (run_n, unit_id));
CREATE TABLE uploads (id PRIMARY KEY, name, run_n, place, object_size, object_type, size,
    content_type);
CREATE INDEX uploads_run ON uploads (run_n, place);
INSERT INTO accounts VALUES
    ('{user_id}', 'user', 'Ada Example', 'ada@sandbox.example', 'member', '{user_key}'),
    ('{viewer_id}', 'user', 'Vera Example', 'vera@sandbox.example', 'viewer', '{viewer_key}'),
    ('{operator_id}', 'user', 'Otto Example', '{operator}', 'member', NULL),
    ('{station_id}', 'station', 'Station 4', NULL, NULL, '{station_key}');
INSERT INTO procedures VALUES ('{procedure_id}', 'Functional test', 1), ('proc_abc', 'Burn-in', 1),
    ('{unlinked_procedure_id}', 'Calibration', 0);
INSERT INTO deployments VALUES ('{deployment_id}', '{procedure_id}', 'production');"""
JOINS = (  # alias, table; they are joined by run.<alias>_id
    ("procedure", "procedures"), ("unit", "units"), ("part", "numbers"), ("revision", "numbers"),
    ("batch", "numbers"), ("version", "numbers"), ("deployment", "deployments"),
    ("user", "accounts"), ("station", "accounts"), ("operator", "accounts"))
ROW = """run.*, procedure.name AS procedure_name, version.number AS tag, unit.sample,
    unit.number AS serial_number, part.number AS part_number, revision.number AS revision_number,
    batch.number AS batch_number, user.name AS user_name, user.email AS user_email,
    station.name AS station_name, operator.email AS operator_email,
    coalesce(operator.name, run.operator_name) AS operated_by"""


class Refused(Exception):
    """An error answer, of the arguments of error_reply: status, message, issues, code."""


def marks(values): return ", ".join("?" * len(values))
def named(id, **fields): return dict(id=id, **fields) if id else None


def select(columns, where, rest=""):
    """A query of runs, with joins for those aliases that it mentions."""
    sql = f"WHERE {where} {rest}"
    joins = "".join(f" LEFT JOIN {table} {alias} ON {alias}.id = run.{alias}_id"
                    for alias, table in JOINS if f"{alias}." in columns + sql)
    return f"SELECT {columns} FROM runs run{joins} {sql}"


def show_row(row):
    """A run as list and get show it; metadata and sequences come on request."""
    part = named(row["part_id"], number=row["part_number"], name=row["part_number"])
    part["revision"] = named(row["revision_id"], number=row["revision_number"])
    return dict(
        pick(row, "id", "outcome", "execution_id", "slot_key", "slot_name", "docstring"),
        created_at=show_time(row["created_at"]), **show_span(row),
        procedure=named(row["procedure_id"], name=row["procedure_name"],
                        version=named(row["version_id"], tag=row["tag"])),
        unit=named(row["unit_id"], serial_number=row["serial_number"], sample=row["sample"],
                   part=part, batch=named(row["batch_id"], number=row["batch_number"])),
        created_by_user=named(row["user_id"], name=row["user_name"], email=row["user_email"]),
        created_by_station=named(row["station_id"], name=row["station_name"]),
        operated_by=row["operated_by"] and {
            "id": row["operator_id"], "name": row["operated_by"], "email": row["operator_email"]})


class Store:
    """The organization's data. Each operation takes the caller and its checked input.

    path        database file; uploaded files go to path + ".files". None: memory and a temp folder
    upload_ttl  seconds an upload URL lives
    knows_ref   False ignores client_run_ref, as older servers do
    patch       whether PATCH of a run's attachments does "append" or "replace"
    """

    def __init__(self, path=None, upload_ttl=60, knows_ref=True, patch="append"):
        self.path, self.upload_ttl, self.knows_ref, self.patch = path, upload_ttl, knows_ref, patch
        self.clock, self.origin, self.folder, self.lock = time.time, "", None, threading.RLock()
        self.db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        self.db.row_factory = lambda cursor, row: {
            column[0]: value for column, value in zip(cursor.description, row)}
        try:
            self.db.execute("PRAGMA synchronous = OFF")  # kept over a kill, not over a power cut
            if not self.one("SELECT 1 FROM sqlite_master WHERE name = 'settings'"):
                self.make()
            self.settings = {s["name"]: s["value"] for s in self.all("SELECT * FROM settings")}
        except sqlite3.Error:
            self.close()
            raise
        self.folder = path + ".files" if path else tempfile.mkdtemp("", "sandbox")
        os.makedirs(self.folder, exist_ok=True)

    def close(self):
        self.db.close()
        if self.folder and not self.path:
            shutil.rmtree(self.folder, ignore_errors=True)

    def make(self):
        """Tables, and an organization: three accounts, a station, three procedures."""
        made = {name + "_id": new_id() for name in (
            "user", "viewer", "operator", "station", "organization", "procedure",
            "unlinked_procedure", "deployment")}
        made.update({f"{name}_key": f"sandbox_{name}_{uuid.uuid4().hex}" for name in (
            "user", "viewer", "station", "storage")}, operator="otto@sandbox.example")
        self.db.executescript(TABLES.format(**made))
        self.db.executemany("INSERT INTO settings VALUES (?, ?)", made.items())
        self.db.execute("COMMIT")

    def all(self, sql, *values): return self.db.execute(sql, values).fetchall()
    def one(self, sql, *values): return self.db.execute(sql, values).fetchone()
    def object_path(self, id): return os.path.join(self.folder, id)

    def add(self, table, **columns):
        sql = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks(columns)})"
        return self.db.execute(sql, tuple(columns.values())).lastrowid

    def transaction(self, operation, *arguments):
        """Runs operation(*arguments) alone: all of it happens or nothing."""
        with self.lock, self.db:
            self.db.execute("BEGIN")
            return operation(*arguments)

    def knows(self, table, id):
        return self.one(f"SELECT 1 FROM {table} WHERE id = ?", id) is not None

    def caller(self, key):
        row = self.one("SELECT type, id, name, email, role FROM accounts WHERE key = ?", key)
        return row and SimpleNamespace(**row)     # type: user or station

    def may_use(self, who, procedure_id):
        return who.type == "user" or self.one(
            "SELECT 1 FROM procedures WHERE id = ? AND linked", procedure_id)

    def run(self, who, id):
        """The number of a run; others than the station's may as well not exist."""
        run = self.one("SELECT n, procedure_id FROM runs WHERE id = ?", id)
        if not run or not self.may_use(who, run["procedure_id"]):
            raise Refused(404, f"Run with ID {id} not found.")
        return run["n"]

    # -- operations on runs

    def list_runs(self, who, args):
        where, values = ["1"], []
        if who.type == "station":
            where = ["run.procedure_id IN (SELECT id FROM procedures WHERE linked)"]
        for name, _, sql in FILTERS:
            value = args.get(name, "")
            if isinstance(value, list):
                where.append(f"{sql} IN ({marks(value)})")
                values += value
            elif value != "":
                where.append(sql)
                values += [value] * sql.count("?")
        for key, types, tests in args.get("metadata", ()):
            sql = " AND ".join(test.format(marks(found)) for test, found in tests)
            where.append("EXISTS (SELECT 1 FROM metadata WHERE run_n = run.n AND key = ?"
                         f" AND type = ? AND {sql})")
            values += [key, *types] + [value for _, found in tests for value in found]
        return self.page(args, " AND ".join(where), values)

    def page(self, args, where, values):
        """One page, in a total order: first its runs by an index alone, then their rows."""
        limit, cursor = args.get("limit", 50), args.get("cursor", 0)
        sort, order = SORTS[args.get("sort_by", "started_at")], args.get("sort_order", "desc")
        order = f"ORDER BY {sort} {order}, run.id {order}"
        inner = select("run.n", where, order + " LIMIT ? OFFSET ?")
        rows = self.all(select(ROW, f"run.n IN ({inner})", order), *values, limit + 1, cursor)
        more, data = len(rows) > limit, []
        for row in rows[:limit]:
            data.append(show_row(row))
            if args.get("include_metadata"):
                data[-1]["metadata"] = self.metadata(row["n"])
            if args.get("include_sequences"):
                data[-1]["sequences"] = [sequence for sequence in json.loads(row["details"])[
                    "sequences"] if sequence["parent_path"] is None]
        return {"data": data,
                "meta": {"has_more": more, "next_cursor": cursor + limit if more else None}}

    def metadata(self, n):
        return {row["key"]: bool(row["value"]) if row["type"] == "boolean" else row["value"]
                for row in self.all("SELECT * FROM metadata WHERE run_n = ? ORDER BY rowid", n)}

    def set_metadata(self, n, changes):
        for key, value in changes.items():
            self.db.execute("DELETE FROM metadata WHERE run_n = ? AND key = ?", (n, key))
            if value is not None:
                self.add("metadata", run_n=n, key=key, type=type_name(value), value=value)

    def get_run(self, who, args):
        n = self.run(who, args["id"])
        row = self.one(select(ROW, "run.n = ?"), n)
        uploads = self.all("SELECT * FROM uploads WHERE run_n = ? ORDER BY place", n)
        return dict(
            show_row(row), **json.loads(row["details"]), metadata=self.metadata(n),
            attachments=[dict(pick(upload, "id", "name", "size", "content_type"), is_report=False,
                              download_url=None if upload["object_size"] is None
                              else self.sign("GET", upload["id"])) for upload in uploads],
            sub_units=self.all(
                "SELECT unit.id, unit.number AS serial_number, part.number AS part_number,"
                " part.number AS part_name FROM sub_units JOIN units unit ON unit.id = unit_id"
                " JOIN numbers part ON part.id = part_id WHERE run_n = ?"
                " ORDER BY sub_units.rowid", n))

    def create_run(self, who, run, id=None):
        """run is what CREATE_RULES made of the body; id is for the examples."""
        procedure_id, slot = run["procedure_id"], (run.get("execution_id"), run.get("slot_key"))
        if not self.may_use(who, procedure_id):
            raise Refused(403, f"Station is not authorized for the procedure {procedure_id}."
                               " Link the procedure to the station first.")
        if not self.knows("procedures", procedure_id):
            raise Refused(404, f"Procedure with ID {procedure_id} does not exist. Check the ID.")
        ref = run.get("client_run_ref") if self.knows_ref else None
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        earlier = self.one("SELECT id, digest FROM runs WHERE client_run_ref = ?", ref)
        if earlier and earlier["digest"] == digest:
            return {"id": earlier["id"]}
        if earlier:
            raise Refused(409, f"client_run_ref is that of run {earlier['id']} with other data.")
        if self.one("SELECT 1 FROM runs WHERE execution_id = ? AND slot_key = ?", *slot):
            raise Refused(409, "Slot {1} of execution {0} has a run already.".format(*slot))
        if "deployment_id" in run and not self.one(
                "SELECT 1 FROM deployments WHERE id = ? AND procedure_id = ?",
                run["deployment_id"], procedure_id):
            raise Refused(400, f"Deployment {run['deployment_id']} is not one of the procedure.")
        text, unit, id = run.get("operated_by"), self.put_unit(run), id or new_id()
        operator = self.one("SELECT id FROM accounts WHERE email = lower(trim(?))", text)
        n = self.add(
            "runs", id=id, created_at=int(1000 * self.clock()), client_run_ref=ref, digest=digest,
            details=json.dumps(show_details(run)), docstring=run.get("docstring") or None,
            operator_id=operator and operator["id"], operator_name=None if operator else text,
            version_id=self.put("version", run.get("procedure_version"), procedure_id),
            **{f"{who.type}_id": who.id}, **unit,
            **pick(run, "procedure_id", "started_at", "ended_at", "outcome", "deployment_id",
                   "execution_id", "slot_key", "slot_name"))
        for serial in run.get("sub_units", ()):
            self.put_sub_unit(n, unit["unit_id"], serial)
        self.set_metadata(n, run.get("metadata", {}))
        return {"id": id}

    def put(self, kind_of, number, scope=""):
        """The ID of a part, revision, batch or version, in any case; made if there is none."""
        row = self.one("SELECT id FROM numbers WHERE kind = ? AND scope = ? AND key = lower(?)",
                       kind_of, scope, number)
        if row or number is None:
            return row and row["id"]
        columns = dict(id=new_id(), kind=kind_of, scope=scope, key=number.lower(), number=number)
        self.add("numbers", **columns)
        return columns["id"]

    def put_unit(self, run):
        """Makes or reuses the unit under test -> unit_id, part_id, revision_id, batch_id."""
        serial, part_number = run["serial_number"], run.get("part_number")
        unit = self.one("SELECT * FROM units WHERE key = ?", serial.lower())
        part_id = unit["part_id"] if unit and not part_number else self.put(
            "part", part_number or serial.rpartition("-")[0] or serial)  # the organization's rule
        if not unit:
            unit = {"id": new_id(), "metadata": "{}"}
            self.add("units", number=serial, key=serial.lower(), **unit)
        values = dict(json.loads(unit["metadata"]), **run.get("unit_metadata", {}))
        if len(values) > MAX_KEYS:
            raise Refused(400, f"unit_metadata: a unit has at most {MAX_KEYS} keys.")
        self.db.execute("UPDATE units SET part_id = ?, metadata = ? WHERE id = ?",
                        (part_id, json.dumps(values), unit["id"]))
        revision_number = run.get("revision_number", DEFAULT_REVISION)
        return {"unit_id": unit["id"], "part_id": part_id,
                "revision_id": self.put("revision", revision_number, part_id),
                "batch_id": self.put("batch", run.get("batch_number"))}

    def put_sub_unit(self, n, parent_id, serial):
        """Moves a unit below the unit under test; the run shows it if its parent changed."""
        unit = self.one("SELECT id, parent_id FROM units WHERE key = ?", serial.lower())
        if not unit or unit["id"] == parent_id:
            raise Refused(400 if unit else 404, f"Sub-unit with serial number {serial} "
                          + ("is the unit under test." if unit else "does not exist."))
        if unit["parent_id"] != parent_id:
            self.db.execute("UPDATE units SET parent_id = ? WHERE id = ?", (parent_id, unit["id"]))
            self.add("sub_units", run_n=n, unit_id=unit["id"])

    def update_run(self, who, args):
        n = self.run(who, args["id"])
        if self.patch == "replace" and "attachments" in args:
            self.db.execute("UPDATE uploads SET run_n = NULL WHERE run_n = ?", (n,))
        for id in args.get("attachments", ()):
            upload = self.one("SELECT run_n FROM uploads WHERE id = ?", id)
            if not upload or upload["run_n"] not in (None, n):
                raise Refused(404, f"Attachment with ID {id} not found.")
            self.db.execute("UPDATE uploads SET run_n = ?, place = ? WHERE id = ? AND run_n IS"
                            " NULL", (n, time.time(), id))
        return {"id": args["id"]}

    def update_metadata(self, who, args):
        n = self.run(who, args["id"])
        self.set_metadata(n, args.get("metadata", {}))
        if len(self.metadata(n)) > MAX_KEYS:
            raise Refused(400, f"metadata: a run has at most {MAX_KEYS} keys.")
        return {"id": args["id"]}

    def delete_runs(self, who, args):
        found = {id: self.one("SELECT n FROM runs WHERE id = ?", id) for id in args["ids"]}
        gone = {id: row["n"] for id, row in found.items() if row}
        if not gone:
            raise Refused(404, "No runs found with these IDs.")
        for n in gone.values():
            for row in self.all("SELECT id FROM uploads WHERE run_n = ? AND object_size >= 0", n):
                os.unlink(self.object_path(row["id"]))
            for table in ("uploads", "metadata", "sub_units"):
                self.db.execute(f"DELETE FROM {table} WHERE run_n = ?", (n,))
            self.db.execute("DELETE FROM runs WHERE n = ?", (n,))
        return {"id": list(gone)}

    # -- attachments, and the storage that their URLs lead to

    def create_attachment(self, who, args):
        """Initializes an upload; where the path names a run, it is linked to it at once."""
        n, id = self.run(who, args["id"]) if "id" in args else None, new_id()
        self.add("uploads", id=id, name=args["name"], run_n=n, place=time.time())
        return {"id": id, "upload_url": self.sign("PUT", id)}

    def finalize(self, who, args):
        upload = self.one("SELECT object_size FROM uploads WHERE id = ?", args["id"])
        if not upload or upload["object_size"] is None:
            raise Refused(404, f"Upload with ID {args['id']} " + (
                "has no file yet: PUT it to its upload_url." if upload else "not found."))
        self.db.execute("UPDATE uploads SET size = object_size, content_type = object_type"
                        " WHERE id = ?", (args["id"],))
        return {"url": self.sign("GET", args["id"])}

    def whoami(self, who, args):
        caller = {name: value for name, value in vars(who).items()
                  if value and name in ("id", "name", "email")}
        return dict({"type": who.type, "station": None, "user": None, "organization": {
            "id": self.settings["organization_id"], "slug": "sandbox", "name": "Sandbox"}},
            **{who.type: caller})

    def sign(self, method, id, expires=None):
        """A URL of the storage, good for one method, one object and a limited time."""
        if expires is None:
            expires = int(self.clock() + (self.upload_ttl if method == "PUT" else 3600))
        signature = hmac.new(self.settings["storage_key"].encode(),
                             f"{method}\n{id}\n{expires}".encode(), "sha256").hexdigest()
        return (f"{self.origin}/storage/{quote(id, safe='')}"
                f"?expires={expires}&signature={signature}")

    def put_object(self, id, blocks, content_type):
        """Stores the blocks as the bytes of an upload; nothing of them if they break off."""
        part = self.object_path(f"{id}.{new_id()}")
        try:
            with open(part, "wb") as file:
                size = sum(map(file.write, blocks))
            os.replace(part, self.object_path(id))
        except BaseException:
            os.unlink(part)
            raise
        sql = "UPDATE uploads SET object_size = ?, object_type = ? WHERE id = ?"
        self.transaction(self.db.execute, sql, (size, content_type, id))

    # -- data to start with

    def fill(self, n, seed=0):
        """Adds n synthetic runs, a minute apart and ending now, for measurements."""
        chance, now, details = random.Random(seed), int(1000 * self.clock()), show_details({})
        common = dict(pick(self.settings, "user_id", "procedure_id"), details=json.dumps(details))
        units = [self.put_unit({"serial_number": f"SN-{i:06}", "part_number": f"PCB-{i % 7}",
                                "batch_number": f"B-{i % 12}"}) for i in range(min(n, 1000))]

        def run(i):
            begin, id = now - 60000 * (n - i), uuid.UUID(int=chance.getrandbits(128), version=4)
            end = begin + chance.randrange(1000, 60000)
            self.add("runs", id=str(id), created_at=end, started_at=begin, ended_at=end,
                     outcome=chance.choice(RUN_OUTCOMES[:3]), **units[i % len(units)], **common)
        self.transaction(lambda: [run(i) for i in range(n)])

    def load_examples(self):
        """The runs and uploads that the documentation's examples name, where they are missing."""
        ada, start = self.caller(self.settings["user_key"]), int(1000 * self.clock()) - 86400000
        for id in ("run_abc", "run_abc123", "run_a", "run_b"):
            start += 600000
            if not self.knows("runs", id):
                run = record(*CREATE_RULES)(Check(self.knows), (), example_run(id, start))
                self.transaction(self.create_run, ada, run, id)
        for id in ("att_1", "att_2"):
            if not self.knows("uploads", id):
                self.add("uploads", id=id, name=f"{id}.txt")
                self.put_object(id, [f"The file of {id}.\n".encode()], "text/plain")


def example_run(id, start):
    """The body of a create with a failed measurement; start is its milliseconds."""
    first, then, last = (show_time(start + ms) for ms in (0, 31000, 150000))
    validators = [{"operator": ">=", "expected_value": 3.1, "outcome": "PASS"},
                  {"operator": "<=", "expected_value": 3.4, "outcome": "FAIL"}]
    measurement = {"name": "vcc", "outcome": "FAIL", "measured_value": 3.52, "units": "V",
                   "validators": validators}
    return {
        "outcome": "FAIL", "procedure_id": "proc_abc", "procedure_version": "1.2.3",
        "serial_number": f"SN-{id}", "part_number": "PCB-V2", "batch_number": "B-2026-07",
        "started_at": first, "ended_at": last, "operated_by": "Night shift",
        "metadata": {"chamber_id": "C-2", "supply_voltage_v": 12.5, "is_retest": False},
        "phases": [{"name": "Power on", "outcome": "FAIL", "started_at": first, "ended_at": then,
                    "measurements": [measurement]}],
        "logs": [{"level": "WARNING", "timestamp": then, "message": "vcc above its limit",
                  "source_file": "main.py", "line_number": 12}]}


# ---- sandbox: http -------------------------------------------------------------------------------

MAX_BODY, BLOCK = 64 << 20, 64 << 10
CODES = {408: "TIMEOUT", 413: "PAYLOAD_TOO_LARGE", 422: "UNPROCESSABLE_CONTENT"}
RUN_ID, NAME = ("id", uuid_of("runs"), "R"), ("name", file_name, "R")
ROUTES = (  # method, path below /api, fields of its query (GET, DELETE) or body, what it does
    ("GET", "/v2/runs", LIST, Store.list_runs),
    ("GET", "/v2/runs/{id}", (RUN_ID,), Store.get_run),
    ("POST", "/v2/runs", CREATE_RULES, Store.create_run),
    ("PATCH", "/v2/runs/{id}", (RUN_ID, ("attachments", array(uuid_of("uploads")), "O")),
     Store.update_run),
    ("PATCH", "/v2/runs/{id}/metadata", (RUN_ID, ("metadata", metadata(null=True), "O")),
     Store.update_metadata),
    ("POST", "/v2/runs/{id}/attachments", (RUN_ID, NAME), Store.create_attachment),
    ("DELETE", "/v2/runs", (("ids", many(uuid_of("runs")), "R"),), Store.delete_runs),
    ("POST", "/v2/attachments", (NAME,), Store.create_attachment),
    ("POST", "/v2/attachments/{id}/finalize", (("id", uuid_of("uploads"), "R"),), Store.finalize),
    ("GET", "/v2/whoami", (), Store.whoami))

Reply = collections.namedtuple("Reply", "status headers body")  # body: an open binary file


def matches(pattern, path):
    """A regular expression for all of a path; {id} is one segment, a last slash may follow."""
    return re.fullmatch(pattern.replace("{id}", "([^/]+)") + "/?", path, re.I)


def read_query(query):
    """'ids=A&ids=B&limit=5' -> {"ids": ["A", "B"], "limit": "5"}; commas split nothing."""
    fields = {}
    for name, _, value in (pair.partition("=") for pair in query.split("&") if pair):
        fields.setdefault(unquote_plus(name), []).append(unquote_plus(value))
    return {name: values if len(values) > 1 else values[0] for name, values in fields.items()}


def read_body(content_type, body):
    """JSON or a form -> dict. A JSON array or text has none of the fields, so it is like {}."""
    if not content_type:
        raise Refused(415, "Missing content-type header")
    form = "application/x-www-form-urlencoded" in content_type.lower()
    if not form and not content_type.lower().startswith("application/json"):
        raise Refused(415, f"Unsupported content-type {content_type}")
    try:
        fields = read_query(body.decode()) if form else load_json(body.decode().strip() or "{}")
    except (ValueError, RecursionError):
        raise Refused(400, "Failed to parse request body", None, "PARSE_ERROR")
    return fields if isinstance(fields, dict) else {}


def answer(store, method, path, query, headers, body):
    """The API without its sockets: a request -> the JSON value of a 200, or Refused is raised.

    headers has lower-case names. The order of the checks is that of the real server.
    """
    found = [(route, matches("/api" + route[1], path)) for route in ROUTES
             if method in (route[0], "HEAD") and matches("/api" + route[1], path)]
    if not found:
        raise Refused(404, "Not found")
    if method == "HEAD":
        return None
    (_, _, fields, operation), match = found[0]
    given = {}
    if method in ("GET", "DELETE"):
        given = read_query(query)
    elif operation is not Store.finalize:  # it has no body, and so no content type
        given = read_body(headers.get("content-type", ""), body)
    scheme, _, key = headers.get("authorization", "").partition(" ")
    who = store.caller(key.strip()) if scheme.lower() == "bearer" else None
    if not who:
        raise Refused(401, "API key is missing, unknown or revoked.")
    if who.type == "station" and method == "DELETE":  # whatever the IDs are
        raise Refused(403, "Stations cannot delete runs: forbidden.")
    check = Check(store.knows)
    args = record(*fields)(check, (), dict(given, **{"id": unquote(id) for id in match.groups()}))
    if operation is Store.create_run:
        across_fields(check, args)
    if check.issues:
        raise Refused(400, "Input validation failed", check.issues)
    if who.role == "viewer" and method != "GET":
        raise Refused(403, "Viewers cannot change anything: forbidden.")
    return store.transaction(operation, store, who, args)


def reply_of(status, body, content_type="application/json", **headers):
    """body: bytes, or a JSON value (None: nothing)."""
    if not isinstance(body, bytes):
        body = b"" if body is None else json.dumps(body).encode()
    return Reply(status, dict(headers, **{"Content-Type": content_type}), io.BytesIO(body))


def error_reply(status, message=None, issues=None, code=None):
    code = code or CODES.get(status) or HTTPStatus(status).name
    error = {"message": message or code.replace("_", " ").capitalize(), "code": code}
    return reply_of(status, dict(error, issues=issues) if issues else error)


def storage_error(status, code, message):
    text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return reply_of(status, b'<?xml version="1.0" encoding="UTF-8"?>\n' + text.encode(),
                    "application/xml")


FAULTS = {  # kind: whether the request is processed before, the options
    "drop-before": (False, {}),  # the connection is closed without an answer
    "drop-after": (True, {}),
    "reset": (False, {}),  # closed by RST
    "cut": (True, {}),  # the answer ends half-way through its body
    "raw": (False, {"data": b"", "forever": b""}),  # data, then closed, or forever again and again
    "slow": (True, {"delay": 0, "event": None, "drip": 0}),  # waits seconds, then for a
    # threading.Event, then seconds before each byte of the answer
    "status": (False, {"status": 503, "body": None, "headers": {}}),  # None: the API's error
    "portal": (False, {"status": 200, "headers": {"Content-Type": "text/html"},
                       "body": b"<!DOCTYPE html><title>Guest network: log in</title>"}),
    "redirect": (False, {"status": 302, "body": b"", "headers": {}, "location": "https://x.test/"})}
ENDS = ("drop-before", "drop-after", "reset", "cut", "raw")  # with these the connection ends too
CHAOS = ("drop-before", "drop-after", "reset", "cut", "status")


class Handler(BaseHTTPRequestHandler):
    """One connection: each request is recorded, perhaps meets a fault, and is answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer may wait 40 ms for the client's ACK

    def log_message(self, *args): pass

    def handle_any(self):
        path, _, query = re.sub("^https?://[^/]*", "", self.path).partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        self.left = int(length) if length.isdigit() else 0
        self.record = SimpleNamespace(method=self.command, path=path, query=query, body=None,
                                      headers=headers)
        if "transfer-encoding" in headers or self.left > MAX_BODY:
            self.close_connection = True
        storage = path.startswith("/storage/")
        if not storage and self.left <= MAX_BODY:
            self.record.body = b"".join(self.blocks())
        fault, reply = self.server.note(self.record), None
        if not fault or fault.after:
            reply = self.process(storage)
        collections.deque(self.blocks(), 0)  # what nobody wanted to read
        try:
            self.strike(fault, reply) if fault else self.send(reply)
        finally:
            if reply:
                reply.body.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_any
    do_CONNECT = handle_any

    def blocks(self):
        """The rest of the request's body, in blocks of bounded size."""
        while self.left:
            block = self.rfile.read(min(BLOCK, self.left))
            if not block:
                raise ConnectionAbortedError
            self.left -= len(block)
            yield block

    def process(self, storage):
        box, record = self.server, self.record
        try:
            if storage:
                return self.storage(box.store)
            if "transfer-encoding" in record.headers:
                raise Refused(501, "Transfer-Encoding is not implemented")
            if record.body is None:
                raise Refused(413, "Request body is too large")
            with box.store.lock:
                return reply_of(200, answer(box.store, record.method, record.path, record.query,
                                            record.headers, record.body))
        except Refused as error:
            return error_reply(*error.args)
        except OSError:
            raise  # the client is gone
        except Exception:
            box.errors.append(traceback.format_exc())
            return error_reply(500, "Internal server error")

    def storage(self, store):
        """PUT and GET of the objects that signed URLs name. It knows no API keys."""
        method, headers = self.record.method, self.record.headers
        id, args = unquote(self.record.path[len("/storage/"):]), read_query(self.record.query)
        signed = store.sign(method, id, args.get("expires")).rpartition("signature=")[2]
        if "authorization" in headers or method not in ("PUT", "GET"):
            return storage_error(403, "AccessDenied", "Access Denied")
        if not hmac.compare_digest(signed.encode(), str(args.get("signature")).encode()):
            return storage_error(403, "SignatureDoesNotMatch", "The signature does not match")
        if store.clock() > int(args["expires"]):
            return storage_error(403, "AccessDenied", "Request has expired")
        if method == "GET":
            row = store.transaction(store.one, "SELECT * FROM uploads WHERE id = ?", id)
            if not row or row["object_size"] is None:
                return storage_error(404, "NoSuchKey", "The specified key does not exist.")
            file = open(store.object_path(id), "rb")
            return Reply(200, {"Content-Type": row["object_type"]}, file)
        if "content-length" not in headers:
            return storage_error(501, "NotImplemented", "PUT needs Content-Length, not chunks")
        store.put_object(id, self.blocks(), headers.get("content-type", "binary/octet-stream"))
        return Reply(200, {}, io.BytesIO())

    def send(self, reply, share=1, pause=0):
        """Head and body in one write, a file in blocks. share=0.5 breaks off half-way."""
        box, length = self.server, reply.body.seek(0, os.SEEK_END)
        lines = [f"HTTP/1.1 {reply.status} {self.responses.get(reply.status, ['Other'])[0]}",
                 f"Date: {self.date_time_string(box.store.clock())}", f"Content-Length: {length}",
                 *(f"{name}: {value}" for name, value in reply.headers.items()),
                 *["Connection: close"] * self.close_connection]
        data, left = "\r\n".join(lines + ["", ""]).encode("latin-1", "replace"), int(share * length)
        reply.body.seek(0)
        while data or left:
            data += reply.body.read(min(BLOCK, left))
            left = max(0, int(share * length) - reply.body.tell())
            for part in (bytes((byte,)) for byte in data) if pause else [data]:
                self.wfile.write(part)
                box.closing.wait(pause)
            data = b""

    def strike(self, fault, reply):
        """What a fault does in place of sending the reply, which is None if it came before."""
        options, closing = fault.options, self.server.closing
        self.close_connection = self.close_connection or fault.kind in ENDS
        if fault.kind == "reset":  # closed before anybody can send a FIN: that makes it a RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.socket(fileno=self.connection.detach()).close()
        elif fault.kind == "raw":
            self.wfile.write(options["data"])
            while options["forever"] and not closing.wait(0.02):
                self.wfile.write(options["forever"])
        elif fault.kind == "cut":
            self.send(reply, share=0.5)
        elif fault.kind == "slow":
            closing.wait(options["delay"])
            while options["event"] and not options["event"].wait(0.02) and not closing.is_set():
                pass
            self.send(reply, pause=options["drip"])
        elif "status" in options:
            status, body = options["status"], options["body"]
            made = error_reply(status) if body is None else reply_of(status, body)
            made.headers.update(options["headers"])
            if "location" in options:
                made.headers["Location"] = options["location"]
            self.send(made)


class Sandbox(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """The server, in threads of this process: `with Sandbox() as box: ...`.

    db, upload_ttl, knows_ref, patch: see Store; tls: an ssl.SSLContext; port: 0 takes a free one.

    url           origin; the API is below url + "/api"; host: without the scheme
    user_key, station_key, viewer_key, operator (an email), organization_id, deployment_id,
    user_id, station_id, operator_id, procedure_id, unlinked_procedure_id (not the station's)
    store         the Store: store.db is its database, store.clock() what it takes for the time
    requests      of each its method, path, query, headers (names in lower case), and body (None
                  for storage)
    connections   how many were accepted
    on_request    None, or a function that gets each request before it is processed
    errors        tracebacks of what was answered by 500: bugs of the sandbox
    """

    daemon_threads, request_queue_size = True, 256
    allow_reuse_address = os.name != "nt"  # there it would let two servers share a port

    def __init__(self, db=None, port=0, examples=False, tls=None, upload_ttl=60, knows_ref=True,
                 patch="append"):
        self.tls, self.connections, self.on_request, self.keep = tls, 0, None, True
        self.requests, self.errors, self.faults, self.chance = [], [], [], None
        self.lock, self.closing, self.open = threading.Condition(), threading.Event(), set()
        self.store = Store(db, upload_ttl, knows_ref, patch)
        vars(self).update(self.store.settings)
        try:
            if examples:
                self.store.load_examples()
            super().__init__(("127.0.0.1", port), Handler)
        except BaseException:
            self.store.close()
            raise
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = self.store.origin = f"http{'s' if tls else ''}://{self.host}"
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    def __exit__(self, *error): self.close()

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()
        with self.lock:
            for connection in self.open:
                with contextlib.suppress(OSError):  # closed already
                    connection.shutdown(socket.SHUT_RDWR)
            self.lock.wait_for(lambda: not self.open, 5)
        self.store.close()

    def get_request(self):
        connection, address = super().get_request()
        if self.tls:  # the handshake is left to the connection's own thread
            connection = self.tls.wrap_socket(connection, server_side=True,
                                              do_handshake_on_connect=False)
        with self.lock:
            self.connections += 1
            self.open.add(connection)
        return connection, address

    def process_request_thread(self, request, client_address):
        super().process_request_thread(request, client_address)
        with self.lock:
            self.open.discard(request)
            self.lock.notify_all()

    def handle_error(self, *args): pass  # the client has closed its connection

    def fault(self, kind, match=None, times=1, skip=0, after=False, **options):
        """Makes requests fail by a kind of FAULTS; of several that match, the first strikes.

        match is None for any request, or "METHOD /path": METHOD may be *, the path is a regular
        expression for all of the path without /api and query, in which {id} is one segment. So
        "POST /v2/runs" is create alone and "PUT /storage/{id}" an upload. The fault strikes times
        requests (None: all) after it let skip pass. after=True: they are processed before.
        """
        processed, defaults = FAULTS[kind]
        method, _, pattern = (match or "* .*").partition(" ")
        if not pattern or not set(options) <= set(defaults):
            raise ValueError(f"fault {kind}: match {match!r} or options {list(options)}")
        self.faults.append(SimpleNamespace(
            kind=kind, method=method, pattern=pattern, times=times, skip=skip,
            after=processed or after, options=dict(defaults, **options)))

    def chaos(self, rate, seed=0, kinds=CHAOS):
        """From now on one of the kinds strikes a share of the requests at random; 0 ends it."""
        self.chance = rate, random.Random(seed), kinds

    def calm(self):
        """Takes back all faults."""
        self.faults, self.chance = [], None

    def note(self, record):
        """Remembers a request -> the fault that strikes it, or None."""
        if self.keep:
            self.requests.append(record)
        if self.on_request:
            self.on_request(record)
        path = re.sub("^/api(?=/)", "", record.path, flags=re.I)
        with self.lock:
            for fault in self.faults:
                if (fault.times != 0 and fault.method in ("*", record.method)
                        and matches(fault.pattern, path)):
                    if not fault.skip:
                        fault.times = fault.times and fault.times - 1
                        return fault
                    fault.skip -= 1
            rate, chance, kinds = self.chance or (0, random, CHAOS)
            if chance.random() >= rate:
                return None
            kind = chance.choice(kinds)
            return SimpleNamespace(kind=kind, after=FAULTS[kind][0], options=FAULTS[kind][1])


# ---- serve ---------------------------------------------------------------------------------------

def serve(argv):
    """A sandbox until Ctrl-C -> exit status. Its first lines can be pasted into a shell."""
    parser = argparse.ArgumentParser(prog="test_tofupilot_runs.py serve",
                                     description="A local server that behaves like the API.")
    parser.add_argument("--port", type=int, default=8787, help="default 8787; 0 takes a free one")
    parser.add_argument("--db", metavar="FILE", help="keep keys, runs and files over a restart")
    parser.add_argument("--examples", action="store_true", help="load the documentation's examples")
    parser.add_argument("--chaos", metavar="RATE", type=float, default=0,
                        help="let this share of the requests fail, such as 0.25")
    args = parser.parse_args(argv)
    try:
        box = Sandbox(args.db, args.port, args.examples)
    except (OSError, OverflowError, sqlite3.Error) as error:
        busy = getattr(error, "errno", None) == errno.EADDRINUSE
        print(f"port {args.port} is busy: stop what uses it, or choose another with --port"
              if busy else f"cannot serve: {error}", file=sys.stderr)
        return 1
    box.keep = False
    box.chaos(args.chaos, seed=None)
    with box, contextlib.suppress(KeyboardInterrupt):
        print(f"export TOFUPILOT_URL={box.url}\nexport TOFUPILOT_API_KEY={box.user_key}\n"
              f"procedure: {box.procedure_id}  a UUID; proc_abc exists too\n"
              f"station key: {box.station_key}  its station is linked to both procedures\n"
              f"operator: {box.operator}  an account of the organization, for --operated-by",
              flush=True)
        while True:
            time.sleep(3600)
    return 0


# ---- tests: harness ------------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "tofupilot_runs.py")
sys.path.insert(0, HERE)
runs = importlib.import_module("tofupilot_runs")

POSIX = os.name == "posix"
RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None    # kills need no fsync
PYENV = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
BEGIN, END = "2026-05-19T08:00:00Z", "2026-05-19T08:00:42Z"
BODY = {"outcome": "PASS", "procedure_id": "proc_abc", "serial_number": "SN-0001",
        "started_at": BEGIN, "ended_at": END}
UNIT = "create --outcome PASS --procedure-id proc_abc --serial-number SN-0001".split()
CREATE = UNIT + ["--started-at", BEGIN, "--ended-at", END]      # the same as a command line
NOBODY = "11111111-2222-4333-8444-555555555555"     # an ID that no run has
CLOSED = "http://127.0.0.1:1"                       # where nobody answers
ANY, ONCE, QUEUE = "* .*", ("--retries", "0"), ("--queue", "q")
WORLD = "Zoë 測試 \U0001f600"


def create(serial, *more, outcome="PASS", procedure="proc_abc"):
    """The command line of a create."""
    words = CREATE[:]
    words[2], words[4], words[6] = outcome, procedure, serial
    return words + list(more)


def save(path, data):
    """Writes a file -> its path."""
    with open(path, "wb") as file:
        file.write(data)
    return path


def content(path):
    """The bytes of a file, {name: content} of a folder, None where nothing is."""
    if os.path.isdir(path):
        return {name: content(os.path.join(path, name)) for name in os.listdir(path)}
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return file.read()


class Ran:
    """What a process of the script (or its main) did: exit status, text of stdout and stderr."""

    def __init__(self, status, *streams):
        self.status = status
        self.out, self.err = ((data or b"").decode("utf-8", "replace") for data in streams)

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


class Case(unittest.TestCase):
    """A test with a sandbox, in a folder of its own, that is also its home.

    Commands run inside this process (ok, fails, inside), which is quick and lets things be
    patched, or in a process of their own (run_script, start).
    """
    options, maxDiff = {}, None     # keyword arguments of the Sandbox
    place = None                    # where its folder is made; None: the usual place

    def setUp(self):
        self.folder = tempfile.mkdtemp("", "tofupilot-test-", self.place)
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.env = {key: value for key, value in os.environ.items()
                    if not key.startswith(("TOFUPILOT_", "PYTHON")) and not key.lower().endswith(
                        "_proxy") and key not in ("COLUMNS", "NO_COLOR", "REQUEST_METHOD")}
        self.box = self.another(**self.options)
        self.env.update(TOFUPILOT_HOME=os.path.join(self.folder, "home"), HOME=self.folder,
                        USERPROFILE=self.folder, PYTHONIOENCODING="utf-8",
                        TOFUPILOT_URL=self.box.url, TOFUPILOT_API_KEY=self.box.user_key)
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
    # -- commands

    def popen(self, *words, env=(), **more):
        """A process in the test's folder. Words go as UTF-8: 3.6 takes them for ASCII in C."""
        process = subprocess.Popen(
            [word.encode("utf-8", "surrogateescape") if POSIX and isinstance(word, str) else word
             for word in words], env=dict(self.env, **dict(env)), cwd=self.folder,
            **dict(dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), **more))
        self.addCleanup(process.kill)
        return process

    def start(self, *args, **more):
        """A process of the script."""
        return self.popen(sys.executable, "-I", "-S", "-W", "error", SCRIPT, *args, **more)

    def ended(self, process, status=None, input=b""):
        """The Ran of a process, which must come to its end (with this status) -> Ran."""
        with process:
            try:
                ran = Ran(None, *process.communicate(input, 60))
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        ran.status = process.returncode
        self.assertNotIn("Traceback", ran.err)
        self.assertEqual(ran.status, ran.status if status is None else status, (process.args, ran))
        return ran

    def run_script(self, *args, status=None, input=b"", **more):
        """Runs the script to its end -> Ran."""
        return self.ended(self.start(*args, **more), status, input)

    def inside(self, *args, tty=False, input=b"", env=()):
        """main() in this process, its waits between tries made short -> Ran."""
        stream = type("Stream", (io.BytesIO,), {"isatty": lambda self: tty})
        raw = stream(), stream(), io.BytesIO(input)
        out, err, stdin = (io.TextIOWrapper(data, "utf-8") for data in raw)
        if sys.version_info < (3, 7):
            args = [os.fsdecode(arg.encode("utf-8", "surrogateescape")) for arg in args]
        handler = signal.getsignal(signal.SIGTERM)
        with mock.patch.multiple(sys, stdout=out, stderr=err, stdin=stdin), \
                mock.patch.dict(os.environ, dict(self.env, **dict(env)), clear=True), \
                mock.patch.object(runs, "delay", lambda *a, **k: 0.001), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)    # of the sandbox's connections
            try:
                status = runs.main(list(args))
                for stream in (sys.stdout, sys.stderr):     # as at the end of a process
                    stream.flush()
                return Ran(status, *(data.getvalue() for data in raw[:2]))
            finally:
                signal.signal(signal.SIGTERM, handler)

    def fails(self, status, *args, **more):
        """inside(), which must end so, in order -> Ran."""
        ran = self.inside(*args, **more)
        self.assertEqual(ran.status, status, (args, more, ran))
        return self.orderly(ran)

    def ok(self, *args, **more):
        """inside(), which must succeed -> Ran."""
        return self.fails(0, *args, **more)

    def orderly(self, ran):
        self.assertNotRegex(ran.err, r"Traceback|unexpected \w+:|Exception|Warning")
        self.assertLessEqual(ran.err.count("error:"), 1)
        return ran

    def terminal(self, *args, answer=b"", **env):
        """Runs the script on a terminal of 80 columns and types the answer -> (status, text)."""
        import pty
        master, slave = pty.openpty()
        text = b""
        env = dict({"COLUMNS": "80", "TERM": "xterm"}, **env)
        with self.popen(sys.executable, "-I", "-S", SCRIPT, *args, stdin=slave, stdout=slave,
                        stderr=slave, env=env) as process:
            os.close(slave)
            os.write(master, answer)
            with contextlib.suppress(OSError):      # Linux: EIO at the end
                for block in iter(lambda: os.read(master, 65536), b""):
                    text += block
            os.close(master)
        return process.returncode, text.decode("utf-8").replace("\r\n", "\n")

    # -- what is here and what is on the server

    def at(self, *names):
        """A path in the test's folder."""
        return os.path.join(self.folder, *names)

    def file(self, name, content=b"content\n"):
        """The path of a new file in the test's folder."""
        return save(self.at(name), content)

    def client(self, **more):
        client = runs.Client(self.box.url, self.box.user_key, **more)
        self.addCleanup(client.close)
        return client

    def made(self, **fields):
        """The ID of a run that another client created."""
        id = self.client().create(**dict(BODY, **fields))["id"]
        del self.box.requests[:]
        return id

    def put(self, run_id, name, data):
        """Attaches a file as another client does."""
        made = self.client().create_attachment(run_id, name)
        urlopen(WebRequest(made["upload_url"], data, {"Content-Type": "x/y"}, method="PUT")).close()
        self.client().finalize(made["id"])

    def whole(self):
        """What get answers for a run that has something in every field."""
        id = self.made(**REPORTED)
        self.put(id, "a.txt", b"x")
        return dict(self.client().get(id), sub_units=[{"serial_number": "S", "part_number": "P"}])

    def attached(self, run_id):
        return [row["name"] for row in self.client().get(run_id)["attachments"]]

    def stored(self):
        """IDs of all runs on the server."""
        return [row["id"] for row in self.box.store.all("SELECT id FROM runs ORDER BY n")]

    def sent(self, *methods):
        """(method, path, query, body) of what arrived since the last time, or of these methods."""
        found = [(r.method, r.path[4:] if r.path.startswith("/api/") else "/storage",
                  parse_qsl(r.query, keep_blank_values=True),
                  json.loads(r.body.decode()) if r.body else None)
                 for r in self.box.requests if not methods or r.method in methods]
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
        self.says("GET /v2/runs/{id}", {"id": "a", "attachments": [dict(
            FILE, download_url=url, **more)]})
        self.box.fault("status", "GET /storage/x", times=None, status=200, body=b"data")


# ---- tests: the command line, the wire, the module -----------------------------------------------

GLOBAL_FLAGS = ("--json --format --columns --out -q -v --dry-run --url --api-key-file --ca-cert "
                "--timeout --retries --allow-http")
COMMANDS_OF_API = ("ls", "get", "create", "update", "update-metadata", "create-attachment", "rm",
                   "attachments initialize", "attachments finalize")     # as ROUTES
OWN_FLAGS = {
    "ls": "--all --page-size --fail-empty --summary", "rm": "--yes", "update-metadata": "--set",
    "get": "--failed-only --logs --download --exit-status", "create-attachment": "--file",
    "create": "--set --body --attach --queue --offline"}
PLAIN_REF = "fa2cc2a9305be0aefd351a9094424f25504d6b294ff8bfc4fcf2d20a6d627727"
FULL_REF = "f7e76d59b3a25def63efd3fd85d830a37f493cae4719bbcb63aeea583e993708"


def flag_of(field):
    """The flag of a field of ROUTES."""
    return "--" + field[0].replace("_", "-")


class FlagsAndHelp(Case):
    def test_the_examples_in_docstrings_hold(self):
        result = doctest.testmod(runs)
        self.assertEqual((result.failed, result.attempted > 10), (0, True))

    def test_every_flag_of_the_api_is_there_and_no_other_than_these(self):
        for command, route in zip(COMMANDS_OF_API, ROUTES):
            text = self.ok(*command.split(), "--help").out
            found = set(re.findall(r"^ +(--?[a-z-]+)", text, re.M)) - {"--help", "-h"}
            own = f"{OWN_FLAGS.get(command, '')} {GLOBAL_FLAGS}".split()
            self.assertEqual(found, set(own) | set(map(flag_of, route[2])), command)

    def test_help_tells_groups_meaning_values_and_an_example_of_each_flag(self):
        text = self.ok("ls", "--help").out
        order = [text.lower().index(f"\n{title}:") for title in (
            "which runs", "unit", "when", "who", "metadata", "page and order", "output",
            "connection")]
        self.assertEqual(order, sorted(order))
        self.assertLess(text.index("ls --procedure-ids"), order[0])      # examples come first
        for word in "PASS FAIL ERROR TIMEOUT ABORTED production golden started_at asc".split():
            self.assertIn(word, text)
        for operation in runs.OPERATIONS.values():
            self.assertTrue(all(field.help and field.example for field in operation.fields))

    def test_help_needs_neither_network_nor_disk_nor_a_key_and_is_the_manual(self):
        for words in "--help", "-h", "help", "help ls", "ls --help", "attachments --help":
            ran = self.ok(*words.split(), env={"TOFUPILOT_URL": "nonsense://"})
            self.assertEqual((ran.err, "tofupilot_runs.py" in ran.out), ("", True))
        self.assertFalse(os.path.exists(self.env["TOFUPILOT_HOME"]))
        ran = self.fails(2)     # no command: a summary, and no success
        self.assertEqual((ran.out, "--help" in ran.err), ("", True))
        digest = hashlib.sha256(content(SCRIPT)).hexdigest()
        for word, told in (
                ("--help", "ls get create update update-metadata create-attachment rm attachments "
                 "queue check 130 143 TOFUPILOT_API_KEY TOFUPILOT_URL TOFUPILOT_CA_CERT NO_COLOR "
                 "TOFUPILOT_HOME TOFUPILOT_QUEUE HTTPS_PROXY --offline --exit-status"),
                ("--version", f"{runs.__version__} {sys.version.split()[0]} OpenSSL {digest}")):
            text = self.ok(word).out
            self.assertEqual([part for part in told.split() if part not in text], [])
        self.assertLess(max(map(len, self.ok("--help").out.splitlines())), 80)

    def test_script_and_sandbox_know_the_same_fields_and_needs(self):
        self.assertEqual(
            {(op.method, op.path): {f.name: f.need for f in op.fields}
             for op in runs.OPERATIONS.values()},
            {route[:2]: {name: rule == "R" for name, _, rule in route[2]} for route in ROUTES})


ODD_WORDS = ["a+b", "a&b=c", "a,b", "50%", "a/b", "x y", WORLD, "#?;", "'\"\\"]
FILTER_LINES = (    # the words after the flag, and the values that they send
    [(flag, ODD_WORDS, ODD_WORDS) for flag in (
        "--procedure-versions --execution-ids --slot-keys --slot-names --serial-numbers "
        "--part-numbers --revision-numbers --batch-numbers --operated-by-names").split()]
    + [(flag, [NOBODY, "proc_abc"], [NOBODY, "proc_abc"]) for flag in (
        "--ids --procedure-ids --deployment-ids --created-by-user-ids --created-by-station-ids "
        "--operated-by-ids").split()]
    + [(flag, words.lower().title().split(), words.split()) for flag, words in (
        ("--outcomes", "PASS FAIL ERROR TIMEOUT ABORTED"), ("--sort-by", "duration"),
        ("--samples", "production golden failing ignored"), ("--sort-order", "asc"),
        ("--environments", "production preview development"))]
    + [(flag, [word], [value]) for flag, word, value in (
        ("--search-query", "a+b &c,%/", "a+b &c,%/"), ("--limit", "37", "37"),
        ("--duration-min", "PT1M30S", "PT1M30S"), ("--duration-max", "1h30m", "PT5400S"),
        ("--started-after", "2026-05-19 10:00:00.123456+0200", "2026-05-19T10:00:00.123456+02:00"),
        ("--started-before", "2026-05-19T08:00Z", "2026-05-19T08:00:00Z"), ("--cursor", "7", "7"),
        ("--ended-after", "2026-05-19T08:00:00-03:30", "2026-05-19T08:00:00-03:30"),
        ("--ended-before", "2026-12-19T08:00:00,5+05:45", "2026-12-19T08:00:00.5+05:45"),
        ("--created-after", "2026-07-19T08:00:00", "2026-07-19T08:00:00-04:00"),    # EDT
        ("--created-before", "2026-01-19", "2026-01-19T00:00:00-05:00"),
        ("--metadata", '{"s": {"in": ["A", "é&"]}, "n": {"gte": 1.5}, "b": {"eq": true}}',
         '{"s": {"in": ["A", "\\u00e9&"]}, "n": {"gte": 1.5}, "b": {"eq": true}}'))]
    + [("--include-metadata", [], ["true"]), ("--include-sequences", ["false"], ["false"])])
RULES = [{"outcome": "PASS", "operator": "range", "expected_value": [1.5, 2]},
         {"operator": "==", "expected_value": {"k": [1, None]}, "expression": "x is fine",
          "is_decisive": False}]
FULL = {
    "deployment_id": "dep 1", "client_run_ref": "mine/1", "execution_id": "ex/1",
    "slot_key": "s+1", "slot_name": "Left nest ✓", "procedure_version": "1.2.3",
    "operated_by": "Adà & co", "part_number": "PCB01", "revision_number": "B",
    "batch_number": "2026-W20", "sub_units": ["P-1", "F-2"], "docstring": "two\nlines " + WORLD,
    "phases": [{"name": "p", "outcome": "SKIP", "started_at": "2026-05-19T08:00:00.5+02:00",
                "ended_at": "2026-05-19T08:00:01+02:00", "retry_count": 2, "docstring": None,
                "sequence_path": "a/b", "newer": {"field": [1]}, "measurements": [
                    {"name": "v", "outcome": "PASS", "measured_value": 9999999999999999,
                     "units": "V", "validators": RULES, "lower_limit": 3, "aggregations": [
                         {"type": "%max", "value": "n/a", "validators": RULES}]},
                    {"name": "xy", "outcome": "UNSET", "x_axis": {"data": [0, -2.5], "units": "s"},
                     "y_axis": [{"data": [], "name": "é"}]},
                    {"name": "old", "outcome": "FAIL", "measured_value": [[1, 2]],
                     "units": ["s", "V"]}]}],
    "sequences": [{"path": "a", "name": "A", "outcome": "PASS"},
                  {"path": "a/b", "name": "B", "outcome": "SKIP", "started_at": None}],
    "logs": [{"level": "DEBUG", "timestamp": BEGIN, "message": WORLD, "source_file": "a.py",
              "line_number": 3}],
    "metadata": {"shift": "A", "temp": 23.4, "n": 12, "ok": False}, "unit_metadata": {"w": 1.0},
    "config": [{"key": "k", "value": True, "version": 3, "source": "station"}],
    "secrets": [{"key": "s", "variable_id": "v", "source": "dotenv"}]}


def words_of(values):
    """The flags of a create that give these values."""
    for name, value in values.items():
        yield "--" + name.replace("_", "-")
        words = value if isinstance(value, list) and isinstance(value[0], str) else [value]
        yield from (word if isinstance(word, str) else json.dumps(word) for word in words)


class RequestsOnTheWire(Case):
    """What each command line sends. It was compared once with what the official SDK sends."""

    @unittest.skipIf(not POSIX, "TZ has another form there")
    def test_each_filter_of_ls_goes_out_once_with_its_exact_value(self):
        args = itertools.chain.from_iterable([flag] + words for flag, words, _ in FILTER_LINES)
        self.run_script("ls", *args, env={"TZ": "EST5EDT,M3.2.0,M11.1.0"})
        (method, path, query, body), = self.sent()
        self.assertEqual((method, path, body), ("GET", "/v2/runs", None))
        self.assertEqual(sorted(query), sorted(
            (flag[2:].replace("-", "_"), v) for flag, _, values in FILTER_LINES for v in values))
        self.assertEqual({flag for flag, _, _ in FILTER_LINES}, set(map(flag_of, LIST)))

    def test_a_create_sends_each_field_as_it_was_given(self):
        self.assertEqual(set(FULL) | set(BODY), {f.name for f in runs.OPERATIONS["create"].fields})
        self.run_script(*CREATE + list(words_of(FULL)))
        self.assertEqual(self.sent(), [("POST", "/v2/runs", [], dict(BODY, **FULL))])
        for name, value in ("newer_field", [1]), ("deployment_id", None):
            self.inside("create", "--body", json.dumps(dict(BODY, **{name: value})))
            self.assertEqual(self.sent()[0][3][name], value)

    def test_the_other_operations_send_method_path_query_and_body(self):
        self.assertEqual(quote("a/b ?%µ+&", safe=""), "a%2Fb%20%3F%25%C2%B5%2B%26")
        for odd in "a/b ?%µ+&", "../x", "a#b", "a\nb", "%2e%2e", "..\\x", "...":
            path = "/v2/runs/" + quote(odd, safe="")
            for line, *expected in (
                    (["get", "--id", odd], "GET", path, [], None),
                    (["update", "--id", odd], "PATCH", path, [], {}),
                    (["update", "--id", odd, "--attachments", "a,b", odd],
                     "PATCH", path, [], {"attachments": ["a,b", odd]}),
                    (["update-metadata", "--id", odd, "--metadata", '{"a":null,"b":1.0,"c":"x"}',
                      *'--set d=true e=1.10 --set f=007 b=2 g="1.1" h=a=b i=-3'.split()],
                     "PATCH", path + "/metadata", [], {"metadata": {
                         "a": None, "b": 2, "c": "x", "d": True, "e": "1.10", "f": "007",
                         "g": "1.1", "h": "a=b", "i": -3}}),
                    (["create-attachment", "--id", odd, "--name", f"{WORLD}.pdf"],
                     "POST", path + "/attachments", [], {"name": f"{WORLD}.pdf"}),
                    (["rm", "--yes", "--ids", odd, "b,c"],
                     "DELETE", "/v2/runs", [("ids", odd), ("ids", "b,c")], None),
                    (["attachments", "initialize", "--name", "a+b &.pdf"],
                     "POST", "/v2/attachments", [], {"name": "a+b &.pdf"}),
                    (["attachments", "finalize", "--id", odd],
                     "POST", path.replace("runs", "attachments") + "/finalize", [], None),
                    (["check"], "GET", "/v2/whoami", [], None)):
                self.inside(*line)
                kind = None if expected[3] is None else "application/json"
                self.assertEqual([self.box.requests[0].headers.get(name) for name in (
                    "authorization", "accept", "content-type")], [
                        "Bearer " + self.box.user_key, "application/json", kind], line)
                self.assertEqual(self.sent(), [tuple(expected)], line)

    def test_flags_stand_anywhere_and_values_come_from_words_files_and_stdin(self):
        self.file("ids.txt", "SN-1\r\n\n  SN-2 \n".encode("utf-8-sig"))
        self.file("m8.json", '{"s": "é"}'.encode("utf-8-sig"))
        self.file("m16.json", '{"s": "é"}'.encode("utf-16"))
        meta = f"update-metadata --id {NOBODY} --metadata "
        for first, *others in (
                ("ls --serial-numbers SN-1 SN-2", "runs ls --serial-numbers SN-1 SN-2",
                 "--retries 0 -v ls --serial-numbers SN-1 SN-2", "ls --serial-numbers @ids.txt",
                 "ls --serial-numbers SN-1 SN-2 -qv --retries=0", "ls --serial-numbers -",
                 "ls --serial-number SN-1 --serial-numbers SN-2",
                 "ls --serial-numbers=SN-1 --serial-number=SN-2"),
                ("ls --outcomes FAIL ERROR --sort-by outcome",
                 "runs ls --outcome fail --outcomes Error --sort-by OUTCOME"),
                ("ls --serial-numbers=-A1", "ls --serial-number=-A1"),
                ("rm --yes --ids SN-1 SN-2", "rm --ids @ids.txt", "rm --ids -"),
                (meta + '{"s":"é"}', meta + "@m8.json", meta + "@m16.json",
                 f"update-metadata --id {NOBODY} --set s=é")):
            for line in others:
                self.inside(*first.split())
                self.inside(*line.split(), input=b"\xef\xbb\xbfSN-1\nSN-2\n")
                one, two = self.sent()
                self.assertEqual(one, two, line)


def nested(**more):
    """--phases of two phases; the measurement of the second has more."""
    phase = {"name": "p", "outcome": "PASS", "started_at": BEGIN, "ended_at": END}
    return ["--phases", json.dumps([phase, dict(phase, measurements=[
        dict({"name": "m", "outcome": "PASS"}, **more)])])]


# command lines, and what the error tells if that is not the name of the last flag
BAD_VALUES = """
ls --outcomes PASSED > --outcomes PASS;  ls --started-after soon;  ls --limit 0;  ls --limit=-5
ls --ended-before 2026-02-30T00:00Z;  ls --created-after 2026-05-19T08:00+25:00;  ls --limit 1.5
ls --duration-min 5x;  ls --page-size 101;  ls --page-size 0;  ls --cursor x;  ls --sort-by date
ls --limit 5 --all > --limit --all;  ls --sort-order up;  ls --include-metadata maybe
ls --timeout 0;  ls --retries x;  ls --retries=-1;  ls --ids=;  ls --ids ..;  get --id=;  get --id .
get --id ..;  update --attachments= --id ..;  update --id a --attachments=;  ls --metadata {s:A}
update --id a --attachments ..;  attachments finalize --id ..;  attachments initialize --name=
rm --ids=;  rm --ids @none.txt > --ids none;  update-metadata --id a --set x;  ls --metadata 1e999
update-metadata --id a --set =1;  update-metadata --id a --metadata [];  ls --metadata []
ls --metadata {"n":{"gte":NaN}} > --metadata NaN;  rm a b > a;  ls --serial-numbers -A1 > =
ls --metadata {"a":1,"b":1,"c":1,"d":1,"e":1,"f":1} > --metadata 5;  create --body [1]
ls --ids - --serial-numbers - > --ids --serial-numbers;  rm --ids - --api-key-file - > --ids -
create --body @none.json > --body none.json;  create-attachment --id a --name=;  get > --id
update-metadata --id a --set k\x1b=1 > k;  rm > --ids;  update > --id
update-metadata --id a > --metadata --set;  create-attachment --id a > --name
attachments initialize > --name"""
MISTYPED = """      # and the word that is suggested
list > ls;  runs list > ls;  delete > rm;  runs delete --ids a > rm;  get --i a > --id
create --serial X > --serial-number;  ls --since 24h > --started-after;  ls --limi 5 > --limit
ls --serial X > --serial-numbers;  ls --part X > --part-numbers;  ls --batch X > --batch-numbers
create --part X > --part-number;  ls --procedure X > --procedure-ids;  ls --output f > --out
create --procedure X > --procedure-id;  ls --station X > --created-by-station-ids
ls --operator X > --operated-by-ids;  ls --started-afer 24h > --started-after;  --jsno ls > --json
create --outcom PASS > --outcome;  create --metadat {} > --metadata;  ls --sort x > --sort-by
atachments finalize > attachments;  attachments finalise --id a > finalize"""
BAD_CREATES = (     # words after a correct create, and what the error tells if not the first flag
    (["--outcome", "PASSED"], "--outcome", "PASS"), (["--procedure-id", ""],), (["--phases", ""],),
    (["--serial-number", "x" * 61],), (["--part-number", "a b"],), (["--operated-by", " "],),
    (["--sub-units", "ok", "é"], "--sub-units", "é"), (["--started-at", "now"],),
    (["--ended-at", "90s"],), (["--started-at", "2026-05-19"],), (["--ended-at", "x"],),
    (["--ended-at", "2026-05-19T09:59:59+02:00"], "--ended-at", "started_at"),
    (["--slot-key", "a"], "--slot-key", "execution_id"), (["--unit-metadata", "[]"],),
    (["--execution-id", "e", "--slot-name", "a"], "--slot-name", "slot_key"),
    (["--metadata", '{"a":null}'],), (["--metadata", '{"a":{}}'], "a"), (["--phases", "{}"],),
    (["--metadata", json.dumps({f"k{n}": n for n in range(51)})], "50"),
    (["--metadata", "{a:1}"], "--metadata", "--set"), (["--set", "a b=1"], "a b"),
    (["--metadata", json.dumps({"k": 50001 * "x"})], "k"), (["--phases", "[1]"], "phases[0]"),
    (["--phases", "[" * 99999],), (["--phases", "-", "--logs", "-"], "--phases", "--logs"),
    (["--logs", '[{"level":"INFO","message":"x","source_file":"f","line_number":1}]'],
     "logs[0].timestamp: missing"), (["--docstring", "\udcff"],),
    (["--logs", '[{"level":"LOUD"}]'], "logs[0].level", "logs[0].message", "logs[0].line_number"),
    (nested(outcome="OK", units=3), "phases[1].measurements[0].outcome",
     "phases[1].measurements[0].units"), (nested(measured_value=math.nan), "NaN"),
    (nested(lower_limit=None), "phases[1].measurements[0].lower_limit"),
    (nested(validators=[{"outcome": "SKIP"}]), "phases[1].measurements[0].validators[0].outcome"),
    (nested(x_axis={"data": [1, "2"]}), "phases[1].measurements[0].x_axis.data[1]"),
    (["--phases", json.dumps([dict(FULL["phases"][0], ended_at=BEGIN[:11] + "06:00:00Z")])],
     "phases[0].ended_at"),
    (["--sequences", '[{"path":"a/b","name":"x","outcome":"PASS"}]'], "sequences[0].path"),
    (["--sequences", json.dumps(2 * FULL["sequences"][:1])], "sequences[1].path"),
    (["--secrets", '[{"key":"k","value":"hush"}]'], "secrets[0].value"),
    (["--config", '[{"key":"k","value":[1]}]'], "config[0].value"), (["--attach", "to"], "to"),
    (["--attach", "no.txt"], "no.txt"), (["--attach", "f.txt", "to/f.txt"], "f.txt", "twice"),
    (["--attach", "f.txt", "--attach", "f.txt"], "f.txt", "twice"))


class WrongInput(Case):
    """All of it ends with exit 2 and a message, before anything reaches the server."""

    def refused(self, words, *told):
        ran = self.inside(*words, "--json", input=b"[]")
        self.assertEqual((ran.status, ran.out, self.sent()), (2, "", []), (words[-5:], ran))
        self.assertEqual(sorted(ran.error),
                         "code exit_code hint issues message status type".split())
        self.assertEqual((ran.error["type"], ran.error["exit_code"]), ("error", 2))
        text = "\n".join([ran.error["message"], ran.error["hint"] or ""] + ran.error["issues"])
        for word in told:       # the flag, or the name of its field
            self.assertTrue(word in text or word[2:].replace("-", "_") in text, (word, text))
        return ran.error

    @staticmethod
    def cases(table):
        """(words, told) of a table above."""
        for case in table.partition("\n")[2].replace("\n", ";").split(";"):
            line, _, told = case.partition(" > ")
            yield line.split(), told.split()

    def test_a_wrong_value_is_refused_with_the_name_of_its_flag_and_a_create_with_its_paths(self):
        for words, told in self.cases(BAD_VALUES):
            self.refused(words, *told or re.findall(r"--[a-z-]+", " ".join(words))[-1:])
        os.mkdir("to")
        self.file("f.txt")
        self.file("to/f.txt")
        for words, *told in BAD_CREATES:
            self.refused(CREATE + words, *told or words[:1])
        self.assertNotIn("--set", self.refused(["ls", "--metadata", "{shift:A}"])["hint"])

    def test_a_mistyped_word_is_told_with_the_right_one_before_what_is_missing(self):
        for words, (meant,) in self.cases(MISTYPED):
            error = self.refused(words)
            self.assertRegex(error["hint"], f"did you mean {meant}\\?")
            self.assertNotIn("missing", error["message"])

    def test_all_problems_are_told_at_once(self):
        error = self.refused(["create", "--outcome", "NO", "--started-at", "x"])
        self.assertEqual([issue.split(":")[0] for issue in error["issues"]], [
            "--outcome", "--started-at", "--procedure-id", "--serial-number", "--ended-at"])
        text = self.fails(2, "create").err
        self.assertTrue(text.startswith("error: "), text)
        for flag in "--outcome --procedure-id --serial-number --started-at --ended-at".split():
            self.assertIn(f"{flag}: missing", text)

    def test_moving_times_are_for_creates_with_a_reference_of_their_own(self):
        self.ok(*UNIT + "--started-at 90s --ended-at now --client-run-ref mine".split())
        body = self.sent()[0][3]
        start, end = (datetime.datetime.strptime(body[name][:23], "%Y-%m-%dT%H:%M:%S.%f")
                      for name in ("started_at", "ended_at"))
        self.assertAlmostEqual((end - start).total_seconds(), 90, delta=1)


class PureFunctions(unittest.TestCase):
    def table(self, function, *cases):
        for value, expected in cases:
            if expected is ValueError:
                self.assertRaises(ValueError, function, value)
            else:
                self.assertEqual(function(value), expected, repr(value))

    def test_times_are_read_in_every_form_and_wrong_ones_refused(self):
        now = datetime.datetime(2026, 5, 19, 8, tzinfo=datetime.timezone.utc)
        self.table(
            lambda text: runs.parse_time(text, now),
            ("2026-05-19T08:00:00z", BEGIN), ("2026-05-19t08:00+0530", BEGIN[:19] + "+05:30"),
            ("2026-05-19 08:00:00.123456789 -0100", "2026-05-19T08:00:00.123456789-01:00"),
            ("90S", "2026-05-19T07:58:30.000+00:00"), ("7d", "2026-05-12T08:00:00.000+00:00"),
            ("2w", "2026-05-05T08:00:00.000+00:00"), ("now", "2026-05-19T08:00:00.000+00:00"),
            *((text, ValueError) for text in (
                "", "2026-13-01T00:00Z", "2026-05-19T24:00Z", "20260519T080000Z", "1779177600",
                "2026-05-19T08:00:00+24:00", "٢026-05-19T08:00Z", "5y")))
        self.table(runs.parse_time, *((text, ValueError) for text in ("90s", "now", "2026-05-19")))
        self.table(runs.instant, ("2026-01-01T00:30:00+01:00", "2025-12-31T23:30:00Z"),
                   ("2026-05-19T08:00:00.000Z", BEGIN),
                   ("2026-05-19T08:00:00.1200-00:30", "2026-05-19T08:30:00.12Z"))

    def test_durations_sizes_words_and_names(self):
        self.table(runs.parse_duration, ("90s", "PT90S"), ("1.5h", "PT5400S"), ("2d", "PT172800S"),
                   ("0.25s", "PT0.25S"), ("p1dt2h", "P1DT2H"), ("P2W", "P2W"),
                   *((text, ValueError) for text in ("PT", "P", "90", "-5s", "", "s", "P1W2D")))
        self.table(runs.duration_text, ("P2W", "14d"), ("PT0S", "0s"), ("P1Y", "P1Y"), (None, ""),
                   ([1], "[1]"), ("x", "x"))
        self.table(runs.size_text, (0, "0 B"), (None, "size unknown"), ("9", "size unknown"),
                   (1500, "1.5 KB"), (184321, "184 KB"), (3e9, "3.0 GB"))
        self.table(runs.parse_word, ("false", False), ("-1.5", -1.5), ("1.0", 1.0), ("0", 0),
                   *((text, text) for text in ("1e3", "1.", "True", "NaN", "1e999", '{"a":1}', "[]",
                                               "", " 1", "+1", "-0", "0x1", "1_0", "٢")))
        self.table(runs.safe_name, ("a.txt", "a.txt"), ("../../x", ".._.._x"), ("", "attachment"),
                   ("nul.txt", "_nul.txt"), ("...", "attachment"), ("a. ", "a"), ("COM1", "_COM1"),
                   ("a\x00\u202eb", "a__b"), ("C:\\x|y", "C__x_y"), ("console", "console"))
        self.assertLess(len(runs.safe_name("測" * 300 + ".tar.gz")), 130)

    def test_text_is_read_in_any_encoding_and_harmless_where_it_is_shown(self):
        self.table(runs.load_json, *(('{"a": "é"}'.encode(encoding), {"a": "é"}) for encoding in (
            "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")))
        self.table(runs.load_json, *((text, ValueError) for text in (
            "NaN", "[Infinity]", "-1e999", "[" * 200000, "{'a': 1}", "", "[1] x")))
        self.table(runs.shown, ("a\tb\r\n\x9b2J", "a\\tb\\r\\n\\x9b2J"), ("é測", "é測"),
                   ("\ud800", "\\ud800"), (None, "null"), ([1, "\x1b"], '[1, "\\u001b"]'))
        self.table(runs.csv_text, ("-1", "-1"), ("+1e5", "+1e5"), ("-1-2", "'-1-2"), ("@x", "'@x"),
                   ("\t=1", "'\t=1"), (" =1", "' =1"), ("\uff1d1", "'\uff1d1"), ("a=1", "a=1"),
                   ("\r=1", "'\\r=1"), ("+a|'/c b'!A0", "'+a|'/c b'!A0"), ("-12V", "'-12V"),
                   ("\x1b[2J", "\\x1b[2J"), ("2026-W20", "2026-W20"), ("-12.5", "-12.5"),
                   (None, ""), (True, "true"))

    def test_the_reference_of_a_content_is_the_same_for_ever(self):
        text = json.dumps(BODY, sort_keys=True, separators=(",", ":"))
        self.assertEqual(hashlib.sha256(text.encode()).hexdigest(), PLAIN_REF)
        full = dict(BODY, **FULL)
        phases = [dict(FULL["phases"][0], started_at="2026-05-19T06:00:00.50Z")]
        for body, ref in ((full, FULL_REF), (dict(full, phases=phases), FULL_REF), (
                dict(sorted(BODY.items()), started_at="2026-05-19T10:00:00.0+02:00"), PLAIN_REF)):
            self.assertEqual(runs.run_ref(body), ref)
        for change in ({"outcome": "FAIL"}, {"docstring": ""}, {"metadata": {"a": 1}},
                       {"ended_at": "2026-05-19T08:00:42.001Z"}, {"newer": 1}):
            self.assertNotEqual(runs.run_ref(dict(BODY, **change)), PLAIN_REF, change)

    def test_only_a_row_that_agrees_in_all_it_shows_is_the_same_run(self):
        row = {"outcome": "PASS", "procedure": {"id": "proc_abc", "version": None}, "unit": {
            "serial_number": "sn-0001", "part": {"number": "P", "revision": {"number": "A"}},
            "batch": None}, "started_at": "2026-05-19T08:00:00.000Z", "docstring": None,
            "ended_at": "2026-05-19T08:00:42.000Z", "operated_by": None, "metadata": {}}
        for theirs in ({}, {"operated_by": {"name": "x", "email": None}}, {"outcome": "FAIL"},
                       {"docstring": "x"}, {"metadata": {"a": 1}}, {"slot_key": "s"},
                       {"ended_at": "2026-05-19T08:00:42.002Z"},
                       {"procedure": {"id": "proc_abc", "version": {"tag": "1"}}}):
            self.assertEqual(runs.same_run(dict(row, **theirs), BODY), not theirs, theirs)
        for ours in ({"part_number": "p"}, {"part_number": "Q"}, {"batch_number": "b"},
                     {"execution_id": "e"}, {"procedure_version": "1"}, {"operated_by": "x"}):
            same = runs.same_run(row, dict(BODY, **ours))
            self.assertEqual(same, ours == {"part_number": "p"}, ours)


class Listing(Case):
    def test_limit_is_the_rows_wanted_over_one_connection(self):
        self.box.store.fill(260)
        for words, pages, count in (
                ("", "0:50", 50), ("--cursor 255 --all", "255:100", 5),
                ("--limit 250", "0:100 100:100 200:50", 250),
                ("--all", "0:100 100:100 200:100", 260),
                ("--limit 70 --page-size 30", "0:30 30:30 60:10", 70)):
            before = self.box.connections
            ids = self.ok("ls", "-q", *words.split()).out.split()
            queries = [dict(query) for _, _, query, _ in self.sent()]
            self.assertEqual([f"{q.get('cursor', 0)}:{q['limit']}" for q in queries], pages.split())
            self.assertEqual((len(ids), len(set(ids)), self.box.connections - before),
                             (count, count, 1), words)

    def test_the_first_page_is_written_before_the_second_is_asked_for(self):
        """Control: without the flush of each page the second request waits its 10 s in vain."""
        self.box.store.fill(150)
        for words, lines in (["-q"], 100), ([], 101), (["--json"], 100), (["--format=csv"], 101):
            printed, held = threading.Event(), []
            self.box.on_request = lambda record: "cursor" in record.query and held.append(
                printed.wait(10))
            with self.start("ls", "--all", *words) as process:
                for _ in range(lines):
                    process.stdout.readline()
                printed.set()
                process.communicate()
            self.assertEqual((held, process.returncode), ([True], 0), words)

    def test_a_page_that_fails_leaves_a_whole_document_or_the_old_file(self):
        self.box.store.fill(150)
        self.says("GET /v2/runs", None, 503, skip=1)
        ran = self.fails(6, "ls", "--all", *ONCE, "--json")
        self.assertEqual((len(ran.json["data"]), ran.json["meta"]), (
            100, {"has_more": True, "next_cursor": 100}))
        self.assertIn("--cursor 100", ran.error["hint"])
        self.file("old.csv", b"old")
        line = ["ls", "--all", *ONCE, "--format", "csv", "--out", "old.csv"]
        self.says("GET /v2/runs", None, 503, skip=1)
        self.fails(6, *line)
        self.assertEqual(content("."), {"old.csv": b"old"})
        self.box.calm()
        self.ok(*line)
        self.assertEqual([data.count(b"\n") for data in content(".").values()], [151])

    def test_a_run_that_slips_to_the_next_page_is_printed_once(self):
        self.box.store.fill(150)
        first, seeds = self.stored(), iter((1, 2))
        self.box.on_request = lambda record: "cursor=100" in record.query and self.box.store.fill(
            3, next(seeds))
        self.assertEqual(sorted(self.ok("ls", "-q", "--all").out.split()), sorted(first))
        ids = self.ok("ls", "-q", "--limit", "120").out.split()
        self.assertEqual((len(ids), len(set(ids))), (120, 120))

    def test_a_cursor_that_does_not_advance_and_an_odd_page_end_with_6(self):
        row = {"data": [{"id": "a"}]}
        for page in (dict(row, meta={"has_more": True, "next_cursor": 0}), dict(row, meta=[]), row,
                     dict(row, meta={"has_more": True, "next_cursor": None}), {"meta": {}},
                     dict(row, meta={"has_more": True}), {"data": {}, "meta": {}},
                     {"data": [1], "meta": {}}):
            self.says(ANY, page, times=5)
            self.fails(6, "ls", "--all")
            self.assertLess(len(self.sent()), 5)

    def test_rows_come_as_table_lines_of_json_csv_and_ids(self):
        id = self.made(docstring="=1+1\t\x1b[2J\n,", metadata={"a": 1})
        self.assertEqual(self.ok("ls").out, "ID\tOUTCOME\tSERIAL\tPROCEDURE\tSTARTED\n"
                         f"{id}\tPASS\tSN-0001\tBurn-in\t2026-05-19T08:00:00Z\n")
        columns = ["ls", "--include-metadata", "--columns", "id,docstring,metadata.a,no.such"]
        self.assertEqual(self.ok(*columns).out.splitlines()[1],
                         f"{id}\t=1+1\\t\\x1b[2J\\n,\t1\t")
        row = json.loads(self.ok("ls", "--format", "jsonl").out)
        self.assertEqual([row], self.ok("ls", "--json").json["data"])
        row = json.loads(self.ok(*columns + ["--format", "jsonl"]).out)
        self.assertEqual((row["id"], row["metadata.a"], row["no.such"]), (id, 1, None))
        text = self.ok(*columns + ["--format", "csv"]).out
        self.assertEqual(list(csv.reader(io.StringIO(text, newline=""))), [
            columns[3].split(","), [id, "'=1+1\t\\x1b[2J\n,", "1", ""]])
        self.assertEqual(self.ok("ls", "--format=csv", "--columns", "id,x\x1b").out.splitlines()[0],
                         '"id","x\\x1b"')
        self.assertEqual(self.ok("ls", "-q").out, id + "\n")
        self.assertEqual(self.fails(2, "ls", "--format", "xml").out, "")

    def test_more_to_come_is_noted_on_stderr_and_nothing_with_json(self):
        self.box.store.fill(60)
        self.assertIn("--cursor 50", self.ok("ls").err)
        self.assertIn("--cursor 12", self.ok("ls", "--limit", "5", "--cursor", "7").err)
        for words in "--limit 60", "--all", "--json", "--json --cursor 90", "--format json":
            self.assertEqual(self.ok("ls", *words.split()).err, "", words)
        line = self.ok("ls", "--json", "-v").err.splitlines()[0]
        self.assertRegex(line, r"^GET \S*/v2/runs\?limit=50 200 \d+ ms$")

    def test_no_match_can_be_a_failure_and_a_summary_counts_yields(self):
        self.assertEqual(self.ok("ls", "--json").json, {
            "data": [], "meta": {"has_more": False, "next_cursor": None}})
        self.assertEqual(self.fails(4, "ls", "--fail-empty", "-q").out, "")
        for number, (serial, outcome) in enumerate((
                ("A", "FAIL"), ("A", "PASS"), ("B", "PASS"), ("C", "FAIL"), ("C", "ERROR"))):
            self.made(serial_number=serial, outcome=outcome, started_at=f"{BEGIN[:18]}{number}Z")
        self.ok("ls", "--fail-empty")
        found = self.ok("ls", "--summary", "--json").json
        row, = found["procedures"]
        self.assertEqual((found["outcomes"], row["units"], row["passed"], row["passed_first"]),
                         ({"PASS": 2, "FAIL": 2, "ERROR": 1}, 3, 2, 1))
        self.assertEqual(found["failing_serials"][0], {"serial_number": "C", "count": 2})
        self.assertIn("66.7%", self.ok("ls", "--summary").out)


ODD_VALUES = (None, 7, -0.5, 1e308, 10 ** 30, True, "", "x\x1b[2J\n", [], {}, [1], [[]], [None],
              [[{}]], {"a": [1]}, {"id": [None]}, "0001-01-01T00:00:00+14:00",
              "9999-12-31T23:59:59-12:00", "PT" + "9" * 400 + "S")
REPORTED = dict(
    example_run("0001", 1779177600000), docstring="Again", part_number="PCB", batch_number="B7",
    procedure_version="1.2", ended_at=END, execution_id="e", slot_key="s", metadata={"shift": "A"})
REPORTED["phases"][0]["retry_count"] = 1
REPORTED["phases"][0]["measurements"].append(
    {"name": "firmware", "outcome": "PASS", "measured_value": "1.1"})
REPORTED["phases"].append(
    {"name": "Sweep", "outcome": "PASS", "started_at": BEGIN, "ended_at": END, "measurements": [
        {"name": "i", "outcome": "PASS", "x_axis": {"data": [0, 1, 2]}, "y_axis": [
            {"data": [5], "name": "A", "units": "mA", "aggregations": [{"type": "max"}]}]}]})


def mutants(value):
    """Copies of a JSON value, each with one odd value somewhere."""
    if isinstance(value, (dict, list)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            for other in mutants(item):
                copy = value.copy()
                copy[key] = other
                yield copy
    yield from ODD_VALUES


class OneRun(Case):
    def test_the_report_tells_verdict_limits_and_distance(self):
        id = self.made(**REPORTED)
        text = self.ok("get", "--id", id).out
        self.assertRegex(text, r"^FAIL +SN-0001 +Burn-in 1\.2 +42s\n")
        for word in (id, "Night shift", "Again", "shift=A", "Sweep", "3 points", "(attempt 2)",
                     "1 WARNING", "--logs", "Ada"):
            self.assertIn(word, text)
        self.assertRegex(text, r"FAIL +vcc +3\.52 V +x >= 3\.1, x <= 3\.4 +<-- 0\.12 above\n")
        text = self.ok("get", "--id", id, "--failed-only", "--logs").out
        self.assertEqual([word in text for word in ("Sweep", "firmware", "vcc above its limit")],
                         [False, False, True])
        self.fails(10, "get", "--id", id, "--exit-status")
        self.ok("get", "--id", self.made(), "--exit-status")
        self.box.fault("status", status=404)
        self.assertIn("35 characters", self.fails(4, "get", "--id", NOBODY[1:]).err)

    def test_json_is_the_untouched_answer(self):
        answer = {"z": [1, 2.50, None], "id": "x", "a": WORLD + "\x1b", "newer": {"k": {}}}
        self.box.fault("status", status=200, body=answer)
        out = self.ok("get", "--id", NOBODY, "--json").out
        self.assertEqual(list(json.loads(out).items()), list(answer.items()))
        self.assertTrue(all(ord(c) < 128 for c in out))

    def test_download_saves_all_files_under_safe_names_and_overwrites_none(self):
        id = self.made()
        for number, name in enumerate(("../x", "CON", "a:b", "a:b", "ok.txt")):
            self.put(id, name, b"%d" % number)
        os.mkdir("to")
        self.file("to/ok.txt", b"mine")
        self.ok("get", "--id", id, "--download", "to")
        self.assertEqual((os.listdir("."), content("to")), (["to"], {
            ".._x": b"0", "_CON": b"1", "a_b": b"2", "a_b-2": b"3", "ok.txt": b"mine",
            "ok-2.txt": b"4"}))

    def test_odd_data_anywhere_never_stops_a_report_a_list_or_a_download(self):
        run = self.whole()
        row = self.client().list(include_metadata=True)["data"][0]
        odd = [dict(copy, id="x") for copy in mutants(run) if isinstance(copy, dict)]
        self.assertGreater(len(odd), 1500)
        for number, copy in enumerate(odd):
            words = ("--logs", "--failed-only", "--format=csv")[number % 3]
            with mock.patch.object(runs.Client, "get", lambda *a, **k: copy):
                ran = self.inside("get", "--id", "x", words, tty=number % 2)
            self.assertEqual((ran.status, ran.err, "\x1b[2J" in ran.out), (0, "", False), copy)
        rows = [dict(copy, id=str(number)) for number, copy in enumerate(mutants(row))
                if isinstance(copy, dict)]
        self.says("GET /v2/runs", {"data": rows, "meta": {}})
        for words, tty in itertools.product(("", "--format csv", "--summary", "-q"), (0, 1)):
            ran = self.ok("ls", *words.split(), tty=tty)
            self.assertEqual(ran.err, "")
            self.assertTrue(words or len(ran.out.splitlines()) == len(rows) + 1)
        for size in ODD_VALUES:
            self.shows(self.box.url + "/storage/x", size=size)
            self.ok("get", "--id", "a", "--download", "to", *ONCE)


class Creating(Case):
    def test_the_same_create_twice_is_one_run_and_another_content_another(self):
        again = UNIT + "--started-at 2026-05-19T10:00:00.0+02:00 --ended-at".split() + CREATE[-1:]
        ids = {self.ok(*words + ["-q"]).out for words in (
            CREATE, again, ["create", "--body", json.dumps(BODY)],
            ["create", "--body", json.dumps(dict(BODY, outcome="FAIL")), "--outcome", "pass"])}
        self.assertEqual((len(ids), len(self.stored())), (1, 1))
        self.assertEqual({body["client_run_ref"] for _, _, _, body in self.sent()}, {PLAIN_REF})
        self.ok(*CREATE + ["--docstring", "x"])
        self.ok(*CREATE + ["--client-run-ref", "mine"])
        self.assertEqual((len(self.stored()), self.sent()[1][3]["client_run_ref"]), (3, "mine"))
        line = CREATE[:-1] + ["2099-01-01T00:00:00Z"]
        self.assertIn("warning: ", self.ok(*line).err)      # it ends in the future
        self.assertEqual(self.ok(*line + ["--json"]).err, "")

    def test_dry_run_needs_no_key_and_sends_nothing(self):
        self.file("a.txt")
        env = {"TOFUPILOT_API_KEY": "", "TOFUPILOT_URL": "https://other.example.com/api/"}
        ran = self.ok(*CREATE + ["--attach", "a.txt", "--dry-run"], env=env)
        first, *others = [json.loads(line) for line in ran.out.splitlines()]
        self.assertEqual(first, {"method": "POST", "url": "https://other.example.com/api/v2/runs",
                                 "body": dict(BODY, client_run_ref=PLAIN_REF)})
        self.assertEqual([row["method"] for row in others if row["method"] != "GET"],
                         ["POST", "PUT", "POST", "PATCH"])
        for words in "ls --all", "rm --ids a", "get --id a --json":
            json.loads(self.ok(*words.split() + ["--dry-run"], env=env).out)
        self.fails(2, *UNIT + ["--dry-run"], env=env)
        self.assertEqual(self.sent(), [])

    def test_files_go_up_without_the_key_and_only_those_that_are_missing(self):
        self.file("a.pdf", b"%PDF" * 50000)
        self.file("empty.xyzzy", b"")
        ran = self.ok(*CREATE + ["--attach", "a.pdf", "empty.xyzzy", "--json"])
        self.assertEqual([row["name"] for row in ran.json["attachments"]], ["a.pdf", "empty.xyzzy"])
        puts = [record.headers for record in self.box.requests if record.method == "PUT"]
        self.assertEqual([[headers.get(name) for name in (
            "content-type", "content-length", "authorization", "transfer-encoding")]
            for headers in puts], [["application/pdf", "200000", None, None],
                                   ["application/octet-stream", "0", None, None]])
        rows = self.client().get(ran.json["id"])["attachments"]
        self.assertEqual([row["size"] for row in rows], [200000, 0])
        for data, count in (b"b", 1), (b"b", 0), (b"B", 1):     # at last only its bytes differ
            self.file("b.txt", data)
            self.sent()
            self.ok(*CREATE + ["--attach", "a.pdf", "empty.xyzzy", "b.txt"])
            self.assertFalse(any("authorization" in record.headers for record in self.box.requests
                                 if "/storage/" in record.path))
            self.assertEqual((len(self.sent("PUT")), len(self.stored())), (count, 1))

    def test_create_attachment_with_a_file_does_the_whole_job(self):
        id = self.made()
        self.file("a.txt", b"a")
        for words, names in (([], ["a.txt"]), (["--name", "b.log"], ["a.txt", "b.log"])):
            self.ok("create-attachment", "--id", id, "--file", "a.txt", *words)
            self.assertEqual(self.attached(id), names)
        ran = self.ok("create-attachment", "--id", id, "--name", "c", "--json")
        self.assertEqual(set(ran.json), {"id", "upload_url"})

    def test_an_upload_url_that_expired_is_asked_for_again_once(self):
        self.file("a.txt")
        self.file("b.txt")
        self.box.fault("status", "PUT /storage/{id}", status=403, body=b"<Error/>")
        id = self.ok(*CREATE + ["--attach", "a.txt", "-q"]).out.strip()
        self.assertEqual((len(self.sent("PUT")), self.attached(id)), (2, ["a.txt"]))
        self.box.store.upload_ttl = -10
        error = self.fails(6, *CREATE + ["--attach", "a.txt", "b.txt", "--json"]).error
        self.assertEqual((len(self.sent("PUT")), error["id"], error["exit_code"]), (2, id, 6))
        self.assertEqual(("b.txt" in error["message"], "signature" in str(error)), (True, False))

    def test_what_others_linked_stays_linked_even_where_patch_replaces(self):
        self.box.store.patch, id = "replace", self.ok(*CREATE + ["-q"]).out.strip()
        self.put(id, "theirs", b"x")
        self.file("a.txt")
        self.ok(*CREATE + ["--attach", "a.txt"])
        self.assertEqual(sorted(self.attached(id)), ["a.txt", "theirs"])


class Trouble(Case):
    """Faults of the network and of what answers in the server's place."""

    def test_each_status_of_the_server_has_its_exit_status(self):
        body = {"message": "Because\x1b", "code": "WORD", "issues": [
            {"message": "wrong", "path": ["phases", 1, "name"]}]}
        for status, expected in (
                (400, 5), (401, 3), (403, 3), (404, 4), (408, 6), (409, 5), (415, 5), (422, 5),
                (425, 6), (429, 6), (500, 6), (502, 6), (503, 6), (504, 6)):
            self.box.fault("status", status=status, body=body)
            error = self.fails(expected, "get", "--id", NOBODY, "--retries=0", "--json").error
            self.assertEqual([error[key] for key in ("status", "code", "exit_code", "issues")],
                             [status, "WORD", expected, ["phases[1].name: wrong"]])
            self.assertEqual(("Because" in error["message"], self.box.user_key in str(error)),
                             (True, False))

    def test_what_is_not_the_api_ends_with_6_and_is_not_tried_again(self):
        for status, body in (
                (404, b"<html>"), (400, b'{"no": "reason"}'), (204, b""), (200, b""),
                (200, b"null"), (200, b"[" * 200000), (200, b'{"data":' + b"[" * 100000),
                (200, b"[]"), (200, b'[{"id": "x"}]'), (200, b'"text"'), (200, b'{"id": 7}'),
                (200, b'{"id": ""}'), (200, b'{"id": "x"'), (200, b'{"id": "x", "n": NaN}'),
                (200, b'{"id": "x", "n": 1e999}'), (200, b'{"id": "\xff"}'),
                (400, b'{"message": "%s"}' % (b"x" * 70000)),
                (200, b'{"id": "%s"}' % (b"x" * (66 << 20)))):
            self.says(ANY, body, status)
            for line in (["get", "--id", NOBODY], CREATE):
                self.assertLess(len(self.fails(6, *line).err), 1000)
                self.assertEqual(len(self.sent()), 1, (status, body[:99]))
        self.says(ANY, b'{"id": "x"}', Content_Type="text/html")
        self.fails(6, "get", "--id", NOBODY)

    def test_a_failed_try_is_announced_and_repeated_where_that_is_safe(self):
        file, id = self.at("a.txt"), self.made()
        places = (("GET /v2/runs", ["ls"]), ("PATCH /v2/runs/{id}", ["update", "--id", id]),
                  ("PUT /storage/{id}", ["create-attachment", "--id", id, "--file", file]))
        faults = [(kind, {}) for kind in ("drop-before", "drop-after", "reset", "cut")] + [
            ("status", {"status": status}) for status in (503, 429, 500, 408, 425)]
        for (kind, options), (place, line) in itertools.product(faults, places):
            if (kind, place[:3]) == ("cut", "PUT"):
                continue        # its answer has no body to cut
            self.file("a.txt", f"{kind} {options}".encode())
            self.box.fault(kind, place, times=3, **options)
            ran = self.ok(*line)        # the first of a kept connection is silent
            self.assertIn(ran.err.count("again in"), (2, 3), (kind, options, ran))
            self.box.fault("status", place)
            self.file("a.txt", f"2 {kind} {options}".encode())
            self.assertEqual(self.ok("--json", *line).err, "")

    def test_retry_after_is_honoured_but_not_without_end(self):
        self.box.fault("status", status=503, headers={"Retry-After": "7"})
        with mock.patch.object(runs, "delay", return_value=0) as delay:
            self.client().list()
        self.assertIn(7, delay.call_args[0])
        self.assertGreaterEqual(runs.delay(1, 1, 7), 7)
        self.box.fault("status", status=429, headers={"Retry-After": "3600"})
        self.sent()
        self.run_script("ls", status=6)
        self.assertEqual(len(self.sent()), 1)

    def test_a_create_without_an_answer_makes_exactly_one_run(self):
        """Controls: without the look an old server has two; without the ref a new one has."""
        faults = "drop-before", "drop-after", "reset", "cut", "status", "status after"
        for knows, fault, times in itertools.product((True, False), faults, (1, 2)):
            self.box.store.knows_ref, count = knows, len(self.stored())
            kind, _, after = fault.partition(" ")
            self.box.fault(kind, "POST /v2/runs", times=times, after=bool(after))
            ran = self.ok(*CREATE + ["--serial-number", f"S-{count}", "-q"])
            self.assertEqual(self.stored()[count:], ran.out.split(), (knows, fault, times))

    def test_on_an_old_server_a_failed_look_sends_nothing_and_other_runs_are_not_adopted(self):
        self.box.store.knows_ref = False
        self.box.fault("drop-after", "POST /v2/runs", times=None)
        self.box.fault("status", "GET /v2/runs", times=None)
        ran = self.fails(6, *CREATE + ["--json"])
        self.assertEqual((len(self.sent("POST")), len(self.stored())), (1, 1))
        self.assertIn("may be stored", ran.error["message"])
        self.box.calm()
        self.box.store.db.execute("UPDATE runs SET created_at = created_at - 3600000")
        self.box.fault("drop-before", "POST /v2/runs")
        self.ok(*CREATE)
        self.assertEqual(len(self.stored()), 2)

    def test_create_attachment_is_not_repeated_once_it_may_have_arrived(self):
        id, client = self.made(), self.client()
        for kind in "drop-after", "drop-before", "reset", "cut":
            self.box.calm()
            self.box.fault(kind, "POST /v2/runs/{id}/attachments", times=None)
            ran = self.fails(6, "create-attachment", "--id", id, "--name", "a", "--json")
            self.assertEqual(len(self.sent("POST")), 1, ran)
            self.assertIn("empty attachment", ran.error["hint"])
            client.get(id)      # the same over a kept connection
            self.assertRaises(runs.Unavailable, client.create_attachment, id, "a")
            self.assertEqual(len(self.sent("POST")), 1)

    def test_a_kept_connection_that_died_is_opened_anew_in_silence(self):
        self.box.store.fill(150)
        self.box.fault("drop-before", "GET /v2/runs", skip=1)
        ran = self.ok("ls", "-q", "--all", "--retries", "0")
        self.assertEqual((len(ran.out.split()), ran.err, self.box.connections, len(self.sent())),
                         (150, "", 2, 3))
        with socket.socket() as free:       # and where nobody is, surely nothing was sent
            free.bind(("127.0.0.1", 0))
            ran = self.inside("ls", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
        self.assertEqual((ran.status, "nothing was sent" in ran.err, "4 tries" in ran.err),
                         (6, True, True), ran)


class Deleting(Case):
    def test_many_ids_are_deleted_100_a_request_with_one_result(self):
        self.box.store.fill(250)
        ids = self.stored()
        self.file("ids.txt", "\n".join(ids).encode())
        self.assertEqual(self.ok("rm", "--ids", "@ids.txt", "--json").json, {"id": ids})
        self.assertEqual([len(query) for _, _, query, _ in self.sent()], [100, 100, 50])
        self.assertEqual(self.stored(), [])

    def test_it_says_which_are_gone_and_which_were_not_there(self):
        id = self.made()
        gone, missing = self.ok("rm", "--ids", NOBODY, id).out.split("Not there")
        self.assertTrue(id in gone and NOBODY in missing, missing)
        self.fails(4, "rm", "--ids", NOBODY)
        self.box.store.fill(101)
        ids = self.stored()
        ran = self.fails(4, "rm", "--ids", *ids[:100], "x", ids[100])
        self.assertIn("no run x (400)", ran.err)
        self.assertIn("100 of 102 runs were deleted", ran.err)
        self.assertEqual(self.stored(), ids[100:])
        self.ok("rm", "--ids", ids[100])
        self.says("DELETE /v2/runs", {"id": "no list"})
        self.fails(6, "rm", "--ids", NOBODY)
        self.box.calm()
        id = self.made()    # a 404 after a try without an answer counts as deleted
        self.box.fault("drop-after", "DELETE /v2/runs")
        self.assertEqual((self.ok("rm", "--ids", id, "-q").out.strip(), self.stored()), (id, []))

    def test_a_request_that_fails_after_others_tells_what_is_gone(self):
        """Control: with the free try taken for one, the unknown IDs count as deleted."""
        self.box.store.fill(101)
        ids = self.stored()
        unknown = [NOBODY[:-2] + str(number) for number in range(10, 60)]
        self.box.fault("drop-before", "DELETE /v2/runs", skip=1)    # its connection was dead
        self.assertEqual(self.ok("rm", "--json", "--ids", *ids[:100], *unknown).json,
                         {"id": ids[:100]})
        self.box.store.fill(100)
        ids = self.stored()
        self.box.fault("status", "DELETE /v2/runs", skip=1)
        self.assertIn("100 of 101 runs were deleted", self.fails(6, "rm", *ONCE, "--ids", *ids).err)
        self.assertEqual(self.stored(), ids[100:])

    @unittest.skipIf(not POSIX, "no pty here")
    def test_on_a_terminal_it_asks_first(self):
        id = self.made()
        for typed in (b"n\n", b"\n", b"\x04"):
            status, text = self.terminal("rm", "--ids", id, answer=typed)
            self.assertEqual((status, self.stored()), (130, [id]), text)
            self.assertIn("Delete 1 run", text)
        self.assertEqual(self.terminal("rm", "--ids", id, answer=b"y\n")[0], 0)
        self.assertEqual((self.stored(), self.terminal("rm", "--yes", "--ids", id)[0]), ([], 4))


class Module(Case):
    def test_the_client_has_the_operations_of_the_official_sdk(self):
        client, naive = runs.Client(), datetime.datetime(2026, 5, 19, 10)
        self.addCleanup(client.close)
        aware = naive.astimezone(datetime.timezone(datetime.timedelta(hours=2)))
        made = client.create(**dict(
            BODY, started_at=naive, ended_at=aware + datetime.timedelta(seconds=5), phases=[
                {"name": "p", "outcome": "PASS", "started_at": naive, "ended_at": aware}]))
        run = client.get(made["id"])
        self.assertEqual((list(made), type(run), run["duration"]), (["id"], dict, "PT5S"))
        self.assertEqual(runs.epoch(run["started_at"]), naive.timestamp())
        self.assertEqual(client.update_metadata(made["id"], {"a": 1, "b": None}), made)
        self.assertEqual(client.update(id=made["id"], attachments=[]), made)
        self.assertEqual(set(client.create_attachment(id=made["id"], name="a")),
                         {"id", "upload_url"})
        page = client.list(outcomes=["PASS"], started_after=aware, include_metadata=True, limit=5)
        self.assertEqual([(row["id"], row["metadata"]) for row in page["data"]],
                         [(made["id"], {"a": 1})])
        self.assertEqual(client.delete(ids=[made["id"]]), {"id": [made["id"]]})
        self.box.store.fill(130)
        self.assertEqual(len({run["id"] for run in client.iterate()}), 130)
        self.assertEqual(len(list(client.iterate(limit=7, page_size=3, started_after="24h"))), 7)
        self.assertEqual(self.box.connections, 1)

    def test_errors_are_split_by_what_a_caller_does_next_and_waits_are_told(self):
        client, told = self.client(retries=0), []
        with self.assertRaises(runs.BadInput) as caught:
            client.create(outcome="PASS", started_at="now", ended_at="x", phases=[{"name": 1}])
        self.assertGreater(len(caught.exception.issues), 6)
        self.box.fault("status", "PATCH .*")
        for kind, call in (
                (runs.BadInput, lambda: client.list(limt=5)),
                (runs.BadInput, lambda: client.get("")),
                (runs.BadInput, lambda: client.get("..")),
                (runs.BadInput, lambda: client.update("a", attachment=["b"])),
                (runs.BadInput, lambda: client.update_metadata("a", {"k": float("nan")})),
                (runs.NotFound, lambda: client.get(NOBODY)),
                (runs.NotFound, lambda: client.get("no UUID")),
                (runs.NotFound, lambda: client.delete([NOBODY])),
                (runs.Unavailable, lambda: client.update(NOBODY)),
                (runs.AccessDenied, lambda: runs.Client(self.box.url, "wrong-key").list())):
            with self.assertRaises(kind) as caught:
                call()
            self.assertIsInstance(caught.exception, runs.Error)
        self.box.fault("status", times=2)
        with mock.patch.object(runs, "delay", lambda *a, **k: 0.001):
            self.client(notify=told.append).list()
        self.assertEqual(len(told), 2)


class OutputThatHolds(Case):
    """Text of the world in all fields, and streams that are closed, full or narrow."""

    def setUp(self):
        super().setUp()
        self.run_id = self.made(
            docstring=WORLD, operated_by=WORLD, slot_key=WORLD, slot_name=WORLD, execution_id=WORLD,
            metadata={"k": WORLD}, logs=FULL["logs"], phases=[dict(
                FULL["phases"][0], name=WORLD, sequence_path=None, measurements=[
                    {"name": WORLD, "outcome": "FAIL", "measured_value": WORLD, "units": WORLD}])])

    def test_no_encoding_or_locale_stops_what_is_shown_or_changes_what_is_sent(self):
        columns, plain = ["ls", "--columns", "docstring"], {"LC_ALL": "C", "LANG": ""}
        for encoding in "cp1252", "ascii", "":
            for words, status in (
                    (columns, 0), (["get", "--id", self.run_id, "--logs"], 0),
                    (columns + ["--format=csv"], 0),
                    (["ls", "--serial-numbers", WORLD, "--fail-empty"], 4)):
                ran = self.ended(self.popen(sys.executable, SCRIPT, *words, env=dict(
                    {} if encoding else plain, PYTHONIOENCODING=encoding)), status)
                if encoding and "docstring" in words:
                    self.assertIn(WORLD.encode(encoding, "backslashreplace").decode(
                        "utf-8", "replace"), ran.out)
        self.run_script(*CREATE, "--docstring", WORLD, "--queue", WORLD, status=0, env=plain)
        self.assertEqual(self.sent()[-1][3]["docstring"], WORLD)
        self.assertIn(WORLD, os.listdir(self.folder))
        self.run_script("ls", "--serial-numbers", WORLD, status=0, env=plain)
        self.assertIn(("serial_numbers", WORLD), self.sent()[0][2])

    def test_a_reader_that_leaves_is_no_failure(self):
        self.box.store.fill(300)
        left = threading.Event()
        self.box.on_request = lambda record: "cursor" in record.query and left.wait(20)
        with self.start("ls", "--all") as process:
            process.stdout.readline()
            process.stdout.close()
            left.set()
            self.assertEqual((process.wait(60), process.stderr.read()), (0, b""))

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_a_full_disk_is_told(self):
        for words in "ls", "ls --json", f"get --id {self.run_id}", "--help", "--version":
            with open("/dev/full", "wb") as full:
                ran = self.run_script(*words.split(), status=1, stdout=full)
                self.assertIn("space", ran.err)
                self.assertEqual(ran.err.count("\n"), 1 if "--json" in words else 2, ran.err)

    @unittest.skipIf(not POSIX, "no pty here")
    def test_a_terminal_gets_a_table_that_fits_with_colour_on_outcomes_alone(self):
        status, text = self.terminal("ls")
        plain = re.sub("\x1b\\[\\d*m", "", text)
        coloured = [word.strip() for word in re.findall("\x1b\\[32m(.*?)\x1b\\[0m", text)]
        self.assertEqual((status, coloured, self.run_id in plain), (0, ["PASS"], True))
        self.assertLess(max(map(len, plain.splitlines())), 80)
        for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            self.assertNotIn("\x1b", self.terminal("ls", **env)[1])
        self.assertNotIn("\x1b", self.ok("ls").out)
        self.assertIn("\x1b[31mFAIL", self.terminal("get", "--id", self.run_id)[1])


# ---- tests: hostile servers, hostile data, odd machines ------------------------------------------

EVIL = "\x1b[2J\x1b]0;own\x07\x9b31m\u202e\u2066\u200b\ufeff\r\n\t\x7f\ud800"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202e\u2066\ufeff\ud800-\udfff]")
EMPTY = b'{"data":[],"meta":{"has_more":false,"next_cursor":null}}'
FILE = {"id": "att_9", "name": "a.txt", "size": 4, "content_type": "text/plain"}


class Proxy(socketserver.ThreadingTCPServer):
    """CONNECT opens a tunnel, other requests go on as they are; heads: of all that came."""
    daemon_threads, handle_error = True, lambda *_: None

    def __init__(self, case):
        super().__init__(("127.0.0.1", 0), self.serve)
        self.host, self.heads = "127.0.0.1:%d" % self.server_address[1], []
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()
        for step in (self.server_close, self.shutdown):
            case.addCleanup(step)

    def serve(self, connection, address, server):
        head = connection.recv(65536)
        while b"\r\n\r\n" not in head:     # 3.8 sends it in pieces
            head += connection.recv(65536)
        self.heads.append(head.decode("latin-1"))
        method, url = self.heads[-1].split(None, 2)[:2]
        parts = urlsplit(url if "//" in url else "//" + url)
        with socket.create_connection((parts.hostname, parts.port)) as target:
            if method == "CONNECT":
                connection.sendall(b"HTTP/1.1 200 Go\r\n\r\n")
            else:
                target.sendall(head)
            threading.Thread(target=self.pipe, args=(target, connection), daemon=True).start()
            self.pipe(connection, target)

    def pipe(self, source, target):
        with contextlib.suppress(OSError):
            for block in iter(lambda: source.recv(65536), b""):
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)


def change(value, to):
    """JSON with to(leaf) in the place of each leaf."""
    if isinstance(value, dict):
        return {key: change(item, to) for key, item in value.items()}
    return [change(item, to) for item in value] if isinstance(value, list) else to(value)


def raw_answer(body, *lines):
    """An HTTP answer of exactly these bytes."""
    if not any(line.startswith(("Content-Length", "Transfer")) for line in lines):
        lines += ("Content-Length: %d" % len(body),)
    return "\r\n".join(("HTTP/1.1 200 OK", "Content-Type: application/json") + lines + (
        "", "")).encode("latin-1") + body


class HostileServers(Case):
    def test_no_redirect_is_followed_and_each_is_told_with_its_target(self):
        """Control: urllib's own handler sends the key along for GET, and POST turns into GET."""
        other, path = self.another(), self.file("a.txt")
        rows = [("GET /v2/runs", ["ls"]), ("POST /v2/runs", CREATE), ("DELETE /v2/runs", [
            "rm", "--ids", "a"]), ("PATCH .*", ["update-metadata", "--id", "a", "--set", "a=1"]),
            ("PUT /storage/{id}", CREATE + ["--attach", path]),
            ("GET /storage/y", ["get", "--id", "a", "--download", self.folder])]
        for status, (match, args) in itertools.product((301, 302, 303, 307, 308), rows):
            self.shows(self.box.url + "/storage/y?signature=abc")
            self.box.fault("redirect", match, status=status, location=other.url + "/x?k=1")
            ran = self.fails(6, *args)
            self.assertIn(other.host, ran.err)
            self.assertNotIn("k=1", ran.err)
        self.assertEqual(other.connections, 0)

    def test_a_storage_url_that_is_no_plain_https_address_is_never_opened(self):
        other, path = self.another(), self.file("secret.txt")
        for url in ("file://" + path, "ftp://{0}/x", "data:text/plain,x", "http://user:pw@{0}/x",
                    "http://{0}/a b", "http://{0}/\x01", "http://{0}/\n", " http://{0}/", "//{0}/x",
                    "http://{0}/\u00e9", "http://{0}\\@localhost/", "http:///x", "http://[::1/",
                    "http://{0}9999/x?signature=s", 5):
            url = url.format(other.host) if isinstance(url, str) else url
            self.says("POST /v2/attachments", {"id": "att_9", "upload_url": url})
            ran = self.fails(6, *CREATE, "--attach", path)
            self.shows(url)
            ran.err += self.fails(6, "get", "--id", "a", "--download", self.folder).err
            self.assertNotRegex(ran.err, "pw@|signature=s")
        self.assertEqual((other.connections, os.listdir(self.folder)), (0, ["secret.txt"]))

    def test_whatever_a_broken_server_says_ends_with_exit_6_and_one_message(self):
        rows = [raw_answer(body, *lines) for body, *lines in (
            [EMPTY, "Content-Encoding: gzip"], [EMPTY, "Content-Encoding: identity, br"],
            [EMPTY, "Content-Length: 3000000000"], [EMPTY[:-5], "Content-Length: 0x99"],
            [b"zz\r\n" + EMPTY, "Transfer-Encoding: chunked"],
            [b"ff\r\n" + EMPTY, "Transfer-Encoding: chunked"], [EMPTY, "X: " + "x" * 100000],
            [EMPTY] + ["X: y"] * 200)]
        rows += [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n",
                 b"HTTP/1.1 999 x\r\n\r\n"]
        if hasattr(sys, "get_int_max_str_digits"):      # else it is a number like others
            rows.append(raw_answer(EMPTY.replace(b"null", b"7" * 100000)))
        for data in rows:
            self.box.calm()
            self.box.fault("raw", "GET /v2/runs", times=None, data=data)
            self.assertLess(len(self.fails(6, "ls", *ONCE).err), 1000, data[:150])
        self.says(ANY, {"message": "x" * 10000000}, 500)
        self.assertLess(len(self.fails(6, "ls", *ONCE).err), 1000)
        self.says(ANY, EMPTY[:-1] + b',"x":"' + b"x" * 5000 + b'"}')
        self.ok("ls")
        with mock.patch.object(runs, "ANSWER_LIMIT", 4000):
            self.fails(6, "ls", *ONCE)

    def test_a_server_that_never_comes_to_an_end_is_left_in_time(self):
        """Guard: the timer over each exchange. A time-out of the socket sees none of the drips."""
        deaf = socket.socket()      # it accepts a connection, and never reads or writes
        self.addCleanup(deaf.close)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(5)
        urls = [f"http{s}://127.0.0.1:{deaf.getsockname()[1]}" for s in ("", "s")]
        for data, forever in (
                (raw_answer(b"", "Content-Length: 999999"), b" "),
                (b"HTTP/1.1 200 OK\r\nX: ", b"x"), (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
                (raw_answer(b"", "Transfer-Encoding: chunked"), b"1\r\n \r\n")):
            box = self.another()
            box.fault("raw", times=None, data=data, forever=forever)
            urls.append(box.url)
        for process in [self.start("ls", "--url", url, "--timeout", "0.3", *ONCE) for url in urls]:
            ran = self.ended(process, 6)
            self.assertRegex(ran.err, "^error: (no answer from|cannot reach) 127.0.0.1")
        ran = self.run_script("ls", "--url", "https://a.example", "--timeout", "0.3", *ONCE,
                              env={"HTTPS_PROXY": urls[3]}, status=6)   # before TLS begins
        self.assertIn("no complete answer", ran.err)


class HostileText(Case):
    def clean(self, ran):
        self.assertNotRegex(ran.out + ran.err, RAW)
        return self.orderly(ran)

    def test_no_field_of_a_run_reaches_a_screen_with_control_characters(self):
        good = dict(self.whole(), metadata={"key" + EVIL: "v"})
        bad = change(good, lambda leaf: EVIL + leaf if isinstance(leaf, str) else leaf)
        lines, plain = {}, {"NO_COLOR": "1"}
        for run in (good, bad):
            self.says("GET /v2/runs/{id}", run)
            self.box.fault("status", "GET /v2/runs", times=None, status=200, body={
                "data": [run, dict(run, id="2")], "meta": {"has_more": False}})
            for args in ("get --id a --logs", "ls", "ls --summary", "ls -q", "get --id a -q",
                         "ls --columns docstring,metadata,phases,unit", "ls --format jsonl",
                         "get --id a --columns logs,unit.serial_number"):
                for tty in (False, True):
                    ran = self.clean(self.ok(*args.split(), tty=tty, env=plain))
                    rows = [line.count("\t") for line in ran.out.splitlines()]
                    self.assertEqual(lines.setdefault((args, tty), rows), rows)
            for args in ("get --id a --json", "ls --json"):
                ran = self.ok(*args.split())
                self.assertRegex(ran.out, r"\A[ -~\n]*\Z")
                self.assertIn(run, [ran.json] + ran.json.get("data", []))

    def test_no_error_reaches_a_screen_with_control_characters(self):
        issue = {"message": EVIL, "path": [EVIL, 0, {}], "code": EVIL}
        body = {"message": "m" + EVIL, "code": EVIL, "issues": [issue, 5, {"path": 1}, {}]}
        rows = [(status, body, CREATE) for status in (400, 401, 403, 404, 409, 503)]
        rows += [
            (200, EVIL.encode("utf-8", "replace"), ["ls"]), (302, b"", ["ls"]),
            (400, {"message": [EVIL], "code": 5, "issues": EVIL}, ["rm", "--ids", "a"]),
            (200, {"data": [], "meta": {"has_more": True, "next_cursor": EVIL}}, ["ls"]),
            (200, {"id": EVIL}, CREATE), (200, {"id": [EVIL, 5]}, ["rm", "--ids", "a"]),
            (200, {"id": EVIL, "upload_url": EVIL}, "attachments initialize --name x".split())]
        for status, answer, args in rows:
            self.says(ANY, answer, status, Location="http://x/\x1b[2J\x9b")
            for more in ((), ("-v",), ("--json",)):
                ran = self.clean(self.inside(*args, *ONCE, *more))
                self.assertRegex(ran.err if more == ("--json",) else "", r"\A[ -~\n]*\Z")
        self.box.calm()
        odd = EVIL[:-1] + "\udcff"     # what a command line can hold
        for args in ("ls --x*", "*", "get --id *", "ls *", "ls --outcomes *", "ls --url *",
                     "ls --limit *", "ls --format *", "queue get *", "queue ls --queue q*",
                     "check --queue q*", "ls --url https://127.0.0.1:1 --ca-cert *", "ls --ids @*",
                     "create --body @*", "create --attach *", "create --metadata {*"):
            args = [word.replace("*", odd) for word in args.split()]
            args = CREATE + args[1:] if args[0] == "create" else args + [*ONCE]
            self.clean(self.inside(*args))

    def test_what_a_server_said_is_stored_and_shown_clean_from_the_queue_too(self):
        self.says("POST /v2/runs", {"message": EVIL, "issues": [{"message": EVIL}]}, 422)
        self.clean(self.ok(*CREATE, *QUEUE))
        entry, = self.ok("queue", "ls", *QUEUE, "--json").json["data"]
        self.assertEqual(entry["state"], "parked")
        for line in ("queue ls", "queue get " + entry["client_run_ref"][:8], "check",
                     "queue ls --format jsonl", "queue retry"):
            self.clean(self.inside(*line.split(), *QUEUE))

    @unittest.skipUnless(POSIX, "such file names exist on POSIX only")
    def test_a_file_name_with_control_characters_is_sent_shown_and_saved_safely(self):
        for name in (b"a\x1b[2J\n.txt", b"b\xff.txt"):
            save(name, b"")
            made = self.clean(self.ok(*CREATE, "--attach", os.fsdecode(name)))
            self.clean(self.ok("get", "--id", made.out.split()[2], "--download", "into"))
        for name in ("../../up", "/etc/x", "C:\\x", "..", "", None, 5, ["/"], "NUL", EVIL, "a\0b",
                     "x" * 500, "\u00b5" * 200, ".", "a/../../b", "\ud800", "..", "x:y", "x."):
            self.shows(self.box.url + "/storage/x", **{"name": name})
            self.clean(self.ok("get", "--id", "a", "--download", "into"))
        for name in os.listdir("into"):
            self.assertNotRegex(name, r'[/\\:*?"<>|]|^NUL|[. ]$|\.part$|' + RAW.pattern)
        self.assertGreater(len(os.listdir("into")), 18)
        self.assertEqual(len(os.listdir(self.folder)), 3)


class Secrets(Case):
    def test_a_key_that_no_header_can_hold_is_refused_and_shown_nowhere(self):
        for bad in (b"S3cr et-key-1", b"S3cret\nkey-1", b"S3cret-\xc3\xbc\xc3\xbc", b"S3cret", b"",
                    b"S3cret\tkey-1", b"S3cret-" + 600 * b"x"):
            path, env = self.file("key", bad), {"TOFUPILOT_API_KEY": os.fsdecode(bad)}
            for more in ((), ("-v",), ("--json",)):
                for ran in (self.fails(3, "ls", *more, "--api-key-file", path),
                            self.fails(3, "ls", *more, env=env)):
                    self.assertNotIn("S3cr", ran.out + ran.err)
        self.fails(3, "ls", "--api-key-file", path + "-missing")
        self.assertEqual(self.box.requests, [])
        key, self.env["TOFUPILOT_API_KEY"] = self.box.user_key.encode(), "another-key"
        for good in (key + b"\r\n", key + b"\n", b" " + key):
            self.ok("ls", "--api-key-file", self.file("key", good))
            self.ok("ls", "--api-key-file", "-", input=good)
        self.fails(2, "ls", "--api-key-file", "-", "--ids", "-")

    def test_no_failure_shows_or_leaves_behind_a_key_or_a_signature(self):
        key, path = self.box.user_key, self.file("a.txt")
        echo = {"status": 400, "body": {"message": "what is Authorization: Bearer " + key}}
        rows = [("status", ANY, {"status": status}) for status in (400, 401, 403, 404, 429, 500)]
        rows += [(kind, ANY, {}) for kind in ("drop-before", "reset", "portal", "redirect")]
        rows += [(kind, match, {}) for kind in ("drop-after", "status", "redirect")
                 for match in ("PUT .*", "POST .*/finalize", "PATCH .*")]
        rows += [("raw", "PUT .*", {"data": b"x"}), ("status", ANY, echo), (
            "status", "PUT .*", dict(echo, status=403)), ("status", "POST /v2/attachments", {
                "status": 200, "body": {"id": "a", "upload_url": CLOSED + "/x?signature=abc"}})]
        for number, (kind, match, options) in enumerate(rows):
            self.box.calm()
            self.box.fault(kind, match, times=None, **options)
            new = CREATE + ["--docstring", str(number), "--attach", path]
            text = [self.inside(*args, "-v") for args in (
                new + [*ONCE], new + [*QUEUE], ["queue", "retry", *QUEUE],
                ["check", *QUEUE, *ONCE], ["queue", "ls", *QUEUE])]
            self.assertTrue(text[0].status, text)
            text += [content(os.path.join(folder, name)).decode("latin-1")
                     for folder, _, names in os.walk(self.folder) for name in names]
            os.remove("q")
            self.assertNotRegex("".join(map(str, text)), "signature=|Traceback|" + key)

    def test_a_key_from_a_credentials_file_goes_where_its_owner_said_and_nowhere_else(self):
        os.mkdir(self.env["TOFUPILOT_HOME"])
        url, key = self.env.pop("TOFUPILOT_URL"), self.env.pop("TOFUPILOT_API_KEY")
        here, there, mine = {"TOFUPILOT_URL": url}, {"base_url": CLOSED}, {"TOFUPILOT_API_KEY": key}
        full = {"api_key": key, "base_url": url}
        for status, files, env in (
                (0, [full], {}), (0, [full, "{"], {}), (0, [{}, full], {}), (0, [None, full], {}),
                (0, [dict(full, api_key=""), full], {}), (0, [{"api_key": key}], here),
                (0, [dict(full, **there)], here), (0, [dict(full, api_key="x" * 9)], mine),
                (0, ["{", "["], dict(here, **mine)), (2, [{"api_key": key}], {}),
                (2, [dict(full, base_url="http://u:pw@127.0.0.1")], {}),
                (2, [dict(full, base_url="http://192.0.2.1")], {}),
                (2, [dict(full, base_url=5)], {}), (3, [], here), (3, [there], here),
                (3, ["{"], here),
                (3, ["[1]"], here), (3, [dict(full, api_key=[key])], here), (3, ["\xff"], here),
                (3, [dict(full, api_key=5)], here), (6, [dict(full, **there)], {})):
            count = len(self.box.requests)
            for name, fields in zip(("credentials.json", "station.json"), files + [None] * 2):
                text = fields if isinstance(fields, str) else json.dumps(fields)
                path = self.file("home/" + name, text.encode("latin-1"))
                os.chmod(path, 0o600)
                if fields is None:
                    os.remove(path)
            ran = self.fails(status, "ls", *ONCE, env=env)
            self.assertNotRegex(ran.err, "pw@|warning|" + key)
            self.assertEqual(len(self.box.requests) - count, status == 0, files)
        path = self.file("home/credentials.json", json.dumps(
            dict(full, organization_slug="acme")).encode())
        os.chmod(path, 0o644)
        made = self.ok(*CREATE)
        for ran in (made, self.ok("get", "--id", made.out.split()[2])):
            self.assertIn(url + "/acme/proc_abc/runs/" + made.out.split()[2], ran.out)
            self.assertEqual("chmod" in ran.err, POSIX)
        self.assertNotIn("/acme", self.ok(*CREATE, env={
            "TOFUPILOT_URL": url.replace("127.0.0.1", "localhost")}).out)

    def test_an_address_that_is_no_https_origin_or_this_machine_is_refused_before_any_connect(self):
        called = []

        def connect(address, *args, **more):
            called.append(address)
            raise ConnectionRefusedError(111, "refused")
        with mock.patch.object(socket, "create_connection", connect):
            for url in (
                    "http://192.0.2.1", "http://localhost.example.com", "http://127.0.0.1.nip.io",
                    "http://localhost@192.0.2.1", "http://2130706433", "ftp://127.0.0.1", "//a",
                    "file:///etc/passwd", "https://user:pw@127.0.0.1", "https://127.0.0.1/x",
                    "https://a b", "https://127.0.0.1\n", "https://", "127.0.0.1", "https://a?b",
                    "https://a#b", "https://a:99999", "https://a:0", "https://a:b", "https://[::1",
                    "https://a\\@b", "https://\u00e9", "https://a/api/v2"):
                for args, env in ((("--url", url), {}), ((), {"TOFUPILOT_URL": url})):
                    self.assertNotIn("pw", self.fails(2, "ls", *args, env=env).err)
            self.assertEqual(called, [])
            self.fails(6, "ls", "--url", "http://192.0.2.1", "--allow-http", *ONCE)
        self.assertEqual(called, [("192.0.2.1", 80)])
        for url in ("http://localhost:1", "http://127.0.0.1", "http://[::1]:80", "https://a:1"):
            for end in ("", "/", "/api", "/api/"):
                self.assertEqual(runs.parse_origin(url + end), url)

    def test_check_says_what_is_wrong_and_never_the_key(self):
        os.mkdir(self.env["TOFUPILOT_HOME"])
        self.file("home/credentials.json", b"{")
        foreign, now = self.file("q", b"no queue"), self.box.store.clock
        for status, name, env, args in (
                (0, "", {}, []), (3, "", {"TOFUPILOT_API_KEY": ""}, []),
                (6, "queue", {}, ["--queue", foreign]), (2, "clock", {}, []),
                (6, "identity", {"TOFUPILOT_URL": CLOSED}, ONCE),
                (3, "identity", {"TOFUPILOT_API_KEY": "wrong-key-1"}, [])):
            self.box.store.clock = lambda: now() - 86400 * (name == "clock")
            ran = self.fails(status, "check", *args, env=env)
            rows = self.fails(status, "check", "--json", *args, env=env).json["data"]
            failed = [row["name"] for row in rows if not row["ok"]]
            self.assertTrue(bool(failed) == bool(status) and name in failed + [""], failed)
            self.assertEqual(len(re.findall("(?m)^FAIL .*\n +Fix: ", ran.out)), len(failed))
            self.assertRegex(ran.out, "sha256 +[0-9a-f]{64}\n")
            self.assertNotIn(self.box.user_key, ran.out + ran.err)
        self.assertEqual(content(foreign), b"no queue")


class Tls(Case):
    @classmethod
    def setUpClass(cls):
        if not shutil.which("openssl"):
            raise unittest.SkipTest("openssl makes the certificates, and is not on this machine")
        cls.made = tempfile.mkdtemp(prefix="tofupilot-test-")
        save(os.path.join(cls.made, "cnf"), (
            b"[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=Factory\n[ca]\n"
            b"basicConstraints=critical,CA:TRUE\n[good]\nsubjectAltName=IP:127.0.0.1\n"
            b"[other]\nsubjectAltName=DNS:example.com\n"))
        new = "req -x509 -new -key key -config cnf -days 30 -extensions "
        sign = "x509 -req -in request -CA ca -CAkey key -set_serial 7 -extfile cnf -extensions "
        for words in ("ecparam -name prime256v1 -genkey -noout -out key", new + "ca -out ca",
                      new + "good -out self",
                      "req -new -key key -config cnf -subj /CN=leaf -out request",
                      sign + "good -days 9 -out good", sign + "other -days 9 -out other",
                      sign + "good -days -1 -out old"):
            subprocess.check_call(["openssl"] + words.split(), cwd=cls.made,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cls.ca, cls.options = os.path.join(cls.made, "ca"), {"tls": cls.server("good")}

    @classmethod
    def server(cls, name):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.path.join(cls.made, name), os.path.join(cls.made, "key"))
        return context

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.made)

    def test_a_private_ca_counts_where_it_is_given_and_every_other_certificate_is_refused(self):
        """The CA is of the old form that 3.13 refuses, unless its strict flag is off."""
        self.box.store.fill(5)
        log, mine = self.at("keys"), ("--ca-cert", self.ca)
        ran = self.ok("ls", "--all", "--page-size", "2", *mine, "--json",
                      env={"SSLKEYLOGFILE": log})
        self.assertEqual((len(ran.json["data"]), self.box.connections), (5, 1))
        self.assertFalse(os.path.exists(log))       # ssl alone writes it
        strict = ssl.create_default_context().verify_flags & getattr(ssl, "VERIFY_X509_STRICT", 0)
        self.fails(6 if strict and sys.version_info >= (3, 13) else 0, "ls", *ONCE,
                   env={"SSL_CERT_FILE": self.ca})
        self.assertRegex(self.fails(6, "ls").err, "(?s)127.0.0.1.*--ca-cert.*clock")
        self.fails(6, "ls", *mine, "--url", self.box.url.replace("127.0.0.1", "localhost"))
        for name in ("other", "old", "self"):
            box = self.another(tls=self.server(name))
            self.fails(6, "ls", *mine, "--url", box.url)
            self.assertEqual(box.requests, [])
        for path in (self.file("garbage", b"x"), self.folder, log, self.file("empty", b"")):
            self.fails(2, "ls", "--ca-cert", path)
        self.env["TOFUPILOT_CA_CERT"], path, other = self.ca, self.file("a.txt"), self.another()
        made = self.ok(*CREATE, "--attach", path, "--json").json["id"]
        self.ok("get", "--id", made, "--download", self.folder)
        self.shows(other.url + "/x")
        self.fails(6, "get", "--id", "a", "--download", ".", "--timeout", "1", *ONCE)
        self.says("POST /v2/attachments", {"id": "a", "upload_url": other.url + "/x"})
        self.fails(6, *CREATE, "--docstring", "new", "--attach", path, "--allow-http",
                   "--timeout", "1", *ONCE)
        self.assertEqual(other.connections, 0)      # plain http, where the API is https

    def test_a_proxy_gets_its_own_password_and_nothing_else_does(self):
        peer, refuses = Proxy(self), self.another()
        refuses.fault("status", times=None, status=407, body=b"")
        self.env.update(TOFUPILOT_CA_CERT=self.ca, TOFUPILOT_API_KEY=self.box.user_key)
        login = "http://user:s3cret@" + peer.host
        box, way, path = self.another(), {"HTTPS_PROXY": login}, self.file("a.txt")
        plain = {"TOFUPILOT_URL": box.url, "TOFUPILOT_API_KEY": box.user_key}
        text = [self.ok(*CREATE, "--attach", path, "-v", env=way)]
        self.assertEqual([head.split()[0] for head in peer.heads], ["CONNECT"])
        text += [self.ok("check", env=way), self.ok("ls", "-v", env=dict(plain, http_proxy=login))]
        self.ok("ls", env=dict(way, NO_PROXY="127.0.0.1"))
        self.assertEqual([head.split()[0] for head in peer.heads], ["CONNECT"] * 2 + ["GET"])
        for head in peer.heads:
            self.assertIn("Basic dXNlcjpzM2NyZXQ=", head)
            self.assertNotIn(self.box.user_key, head)
        for record in self.box.requests:
            self.assertNotIn("proxy-authorization", record.headers)
        for host in (refuses.host, "127.0.0.1:1"):
            bad = "http://user:s3cret@" + host
            for env in ({"HTTPS_PROXY": bad}, dict(plain, http_proxy=bad)):
                text += [self.fails(6, name, "-v", *ONCE, env=env) for name in ("ls", "check")]
        self.assertNotRegex("".join(map(repr, text)), "s3cret|dXNl")


class OddMachines(Case):
    def python(self, *args, **more):
        """A process of this Python, warnings as errors -> Ran."""
        return self.ended(self.popen(sys.executable, "-B", "-W", "error", *args, **more))

    def wrapped(self, code, *args):
        """A process that runs `code` before it imports the script and calls main."""
        return self.python("-c", "import os, sys\nsys.path.insert(0, %r)\n%s\nimport "
                           "tofupilot_runs\nsys.exit(tofupilot_runs.main())" % (HERE, code), *args)

    @unittest.skipUnless(POSIX, "there are no FIFOs")
    def test_only_a_regular_file_is_attached_also_behind_a_link(self):
        os.mkfifo("fifo")
        os.symlink(self.file("a.txt", b"behind"), "link")
        os.symlink("fifo", "bad")
        for path in ("fifo", "bad", "missing", "a.txt/x", "/dev/zero", "/dev/null", ".", ""):
            for line in ([*CREATE, "--attach"], [*CREATE, *QUEUE, "--attach"],
                         [*CREATE, "--offline", "--attach"],
                         ["create-attachment", "--id", "a", "--file"]):
                self.assertIn(path, self.fails(2, *line, path).err)
        self.assertEqual((self.box.requests, os.path.exists("q")), ([], False))
        made = self.ok(*CREATE, "--attach", "link", "--json").json["id"]
        self.ok("get", "--id", made, "--download", "into")
        self.assertEqual(content("into/link"), b"behind")

    def test_a_file_that_changes_while_it_is_read_is_not_attached(self):
        for number, change_it in enumerate((lambda: os.truncate(path, 100001), lambda: os.truncate(
                path, 0), lambda: os.utime(path, (1, 1)), lambda: os.truncate(path, 1000))):
            path = self.file("a.txt", b"x" * 100000)
            self.box.on_request = lambda record: change_it() if (
                record.path == "/api/v2/attachments") else None
            ran = self.fails(2, *CREATE, "--docstring", str(number), "--attach", path)
            self.assertIn("changed", ran.err)
            self.assertNotIn("PATCH", [record.method for record in self.box.requests])

    def test_no_command_leaves_a_warning_or_an_open_file(self):
        path = self.file("a.txt")
        for args in (["--help"], ["ls", "--help"], ["--version"], ["ls", "--all"], ["check"],
                     CREATE + ["--attach", path], ["ls", "--out", "o"], CREATE + [*QUEUE],
                     CREATE + ["--offline", *QUEUE], ["queue", "send", *QUEUE],
                     ["queue", "ls", *QUEUE], ["queue", "move", "r", *QUEUE], ["create"],
                     ["ls", "--url", CLOSED, *ONCE]):
            ran = self.orderly(self.python("-X", "dev", SCRIPT, *args))
            self.assertEqual(ran.status, 2 if args == ["create"] else 6 * ("--url" in args), ran)

    def test_a_python_that_is_too_old_shows_which_one_is_needed(self):
        found = [shutil.which(name) for name in ("python2", "python2.7", "python3.5")] + glob.glob(
            os.path.join(PYENV, "versions", "[23].[57].*", "bin", "python"))
        old = [name for name in found if name and subprocess.call(
            [name, "-c", "import sys; sys.exit(sys.version_info >= (3, 6))"],
            stderr=subprocess.DEVNULL) == 0]
        for name in old or self.skipTest("there is no Python before 3.6 on this machine"):
            ran = self.ended(self.popen(name, SCRIPT, "ls"), 1)
            self.assertIn("needs Python 3.6 or newer", ran.err)

    def test_closed_or_missing_standard_streams_change_nothing_but_what_is_shown(self):
        rows = [(0, ["ls"]), (0, CREATE + ["--queue", "q"]), (0, ["check", "--queue", "q"]),
                (2, ["ls", "--x"]), (2, ["rm", "--ids", "-"]), (4, ["get", "--id", NOBODY]),
                (0, ["--help"])]
        for closed, (status, args) in itertools.product(((0,), (1,), (2,), (0, 1, 2)), rows):
            for ran in (self.python(
                    "-W", "ignore::ResourceWarning", SCRIPT, *args, preexec_fn=POSIX and (
                        lambda: [os.close(number) for number in closed]) or None),
                        self.wrapped("\n".join("sys." + ("stdin", "stdout", "stderr")[number]
                                               + " = None" for number in closed), *args)):
                self.assertEqual(ran.status, status, (closed, args, ran))
                self.orderly(ran)
        self.assertEqual(self.ok("queue", "ls", *QUEUE, "--json").json["meta"]["sent"], 1)

    def test_a_home_that_is_missing_or_cannot_be_written_stops_only_the_queue_in_it(self):
        env = {"TOFUPILOT_HOME": os.path.join(self.file("a.txt", b""), "x")}    # root can write
        for args in (["ls"], ["check"], CREATE + ["--queue", "q"]):
            self.ok(*args, env=env)
        self.assertIn("NOT stored", self.fails(6, *CREATE, "--offline", env=env).err)
        for name in ("HOME", "USERPROFILE", "TOFUPILOT_HOME"):
            del self.env[name]
        self.run_script("ls", status=0)
        self.run_script("check", "--queue", "q", status=0)

    def test_a_python_without_ssl_or_sqlite3_does_all_that_needs_neither(self):
        lack = "for name in %r.split(): sys.modules[name] = None\n"
        no_ssl, no_sqlite = lack % "ssl _ssl", lack % "sqlite3 _sqlite3"
        unlike_posix = lack % "fcntl ctypes readline" + "del os.O_NONBLOCK, os.getuid" * POSIX
        for args in (["--version"], ["ls"], CREATE, ["check"], ["get", "--help"]):
            for code in (no_ssl + no_sqlite, unlike_posix):
                ran = self.orderly(self.wrapped(code, *args))
                self.assertEqual(ran.status, 0, ran)
        queue = self.at("q")
        for code, statuses, args, says in (
                (no_ssl, (2, 6), ["ls", "--url", "https://127.0.0.1:1", *ONCE], "(?i)error: .*ssl"),
                (no_sqlite, (0,), CREATE, "directly"), (no_sqlite, (4,), ["queue", "send"], queue),
                (no_sqlite, (6,), CREATE + ["--offline"], "NOT stored"),
                (no_ssl, (0,), CREATE + ["--offline"], "")):
            args = args + ["--queue", queue] * (args[0] != "ls")
            ran = self.orderly(self.wrapped(code, *args))
            self.assertIn(ran.status, statuses, ran)
            self.assertTrue(re.search(says, ran.err), ran)

    def test_what_windows_does_differently_is_dealt_with(self):
        for winerror, fails, calls in ((32, 3, 4), (5, 3, 4), (32, 99, 0), (1, 1, 1), (None, 1, 1)):
            error, waits = PermissionError(13, "in use"), []
            error.winerror = winerror
            with mock.patch.object(os, "replace", side_effect=[error] * fails + [None]) as called, \
                    mock.patch.object(time, "sleep", waits.append):
                with contextlib.suppress() if calls == 4 else self.assertRaises(PermissionError):
                    runs.replace("a", "b")
            self.assertEqual(called.call_count, calls or len(waits) + 1)
            self.assertLessEqual(sum(waits), 6)
        os.mkdir(".tofupilot")
        path = self.file(".tofupilot/credentials.json", json.dumps(
            {"api_key": self.box.user_key, "base_url": self.box.url}).encode())
        os.chmod(path, 0o600)
        with mock.patch.object(os, "name", "nt"), mock.patch.dict(
                os.environ, {"HOME": "/nowhere", "USERPROFILE": self.folder}, clear=True):
            self.assertEqual(runs.find_login(warn=self.fail)[:2], (self.box.url, self.box.user_key))
        ids = "@" + self.file("ids", b"\xef\xbb\xbfa\r\nb\r\n\r\n")
        self.ok("ls", "--serial-numbers", ids)
        self.assertRegex(self.box.requests[-1].query, "^serial_numbers=a&serial_numbers=b&limit")
        path = self.file("C:\\data\\scope.png") if POSIX else self.file("scope.png")
        with mock.patch.object(os.path, "basename", ntpath.basename):
            self.assertIn(" scope.png ", self.ok(*CREATE, "--attach", path).out)


@unittest.skipUnless(POSIX, "Windows has no such signals")
class Signals(Case):
    def test_ctrl_c_and_sigterm_end_every_wait_at_once_and_leave_no_half_file(self):
        half = raw_answer(b"x" * 1000, "Content-Length: 999999")
        path, _ = self.file("a.txt"), self.box.store.fill(5)
        rows = [("half", "GET", 2, ["get", "--id", "a", "--download", "."]),
                ("503", "GET", 1, ["ls"]), ("slow", "GET", 1, ["ls"]),
                ("slow", "GET", 2, ["ls", "--all", "--page-size", "2", "--out", "o"]),
                ("slow", "POST", 1, CREATE), ("slow", "PUT", 1, CREATE + ["--attach", path]),
                ("slow", "GET", 1, ["check"]), ("slow", "POST", 1, ["queue", "send", *QUEUE])]
        for (number, status), (kind, method, count, args) in itertools.product(
                ((signal.SIGINT, 130), (signal.SIGTERM, 143)), rows):
            self.ok(*CREATE, "--offline", "--docstring", str(status), *QUEUE)
            hits, moment = [], threading.Event()
            self.shows(self.box.url + "/storage/y")
            if kind == "half":
                self.box.fault("raw", "GET /storage/y", data=half, forever=b"x")
            elif kind == "503":
                self.says("GET /v2/runs", {}, 503, Retry_After="30")
            else:
                self.box.calm()
                self.box.fault("slow", method + " .*", skip=count - 1, event=self.box.closing)

            def note(record):
                hits.extend([1] * (record.method == method))
                if len(hits) == count:
                    moment.set()
            self.box.on_request = note
            # without -W error: any moment is any line
            process = self.popen(sys.executable, SCRIPT, *args)
            if kind == "503":
                self.assertIn(b"again in", process.stderr.readline())
            self.assertTrue(moment.wait(20))
            time.sleep(0.2 * (kind == "half"))      # until some of it is there
            for _ in range(4):      # one that comes just before a system call waits for its end
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                    break
            ran = self.orderly(self.ended(process))
            self.assertEqual((ran.status, ran.err.count("\n")), (status, 1), (args, ran))
            self.assertIn("Ctrl-C" if status == 130 else "SIGTERM", ran.err)
            self.assertEqual(set(os.listdir(self.folder)) - {"q", "q.lock"}, {"a.txt"})


# ---- tests: queue --------------------------------------------------------------------------------

FORGE = r"""
import importlib.util, json, os, random, signal, sys
import email.utils, hashlib, http.client, mimetypes, sqlite3, ssl, threading, urllib.request
spec = importlib.util.spec_from_file_location("tofupilot_runs", sys.argv[1])
runs = sys.modules["tofupilot_runs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

for line in sys.stdin:
    folder, env, argv, patch, n, alarm = json.loads(line)
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(env)
            for number, name in enumerate([os.devnull] + sys.argv[2:]):
                file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(file, number)
                os.close(file)
            random.seed()
            exec(patch, {"runs": runs, "os": os, "sys": sys, "n": n})
            signal.setitimer(signal.ITIMER_REAL, alarm)     # nothing catches it: as by SIGKILL
            status = runs.main(argv)
            sys.stdout.flush()
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
KILL = AT_STATEMENT % "seen[0] == n: os.kill(os.getpid(), 9)"
FULL_DISK = AT_STATEMENT % """seen[0] >= n and sql[:6] in ("INSERT", "UPDATE", "COMMIT", "PRAGMA"):
        raise self.unusable("database or disk is full")"""
NO_LOOK = "runs.Client.find_created = lambda *args, **more: None\n"
NO_LOCK = """import contextlib
runs.Queue.sender = contextlib.contextmanager(lambda self: iter([True]))
"""


class Forge:
    """A process that has loaded the script and forks for each command line: 10 ms, not 100.

    One command at a time. `patch` is code that sees runs, os, sys and n; `alarm`: it is killed
    after so many seconds.
    """
    there = hasattr(os, "fork")

    def __init__(self):
        self.folder = tempfile.mkdtemp("", "forge-")
        self.output = [os.path.join(self.folder, name) for name in ("out", "err")]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-W", "error", "-c", FORGE, SCRIPT] + self.output,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, folder, env, argv, patch="", n=0, alarm=0):
        """Begins a command line -> its process's id. end() must follow."""
        job = json.dumps([folder, env, list(argv), patch, n, alarm]).encode() + b"\n"
        self.process.stdin.write(job)
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Waits for it -> Ran; its status is -9 or -14 if it was killed."""
        return Ran(int(self.process.stdout.readline()), *map(content, self.output))

    def run(self, *args, **more):
        self.start(*args, **more)
        return self.end()

    def close(self):
        with self.process:
            self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def on_server(box):
    """For each serial a list of its runs' attachments, each a list of (name, size, bytes)."""
    found, opener = {}, build_opener(ProxyHandler({}))
    with contextlib.closing(runs.Client(box.url, box.user_key)) as client:
        for row in client.iterate():
            found.setdefault(row["unit"]["serial_number"], []).append([
                (file["name"], file["size"], file["size"] and opener.open(
                    file["download_url"]).read()) for file in client.get(row["id"])["attachments"]])
    return found


def account(found, expected):
    """What is wrong with a server's content. `expected`: {serial: {name: bytes}}, a run each."""
    wrong = collections.Counter(unknown=len(set(found) - set(expected)))
    for serial, files in expected.items():
        wrong.update(lost=serial not in found, doubled=len(found.get(serial, [0])) - 1)
        for rows in found.get(serial, []):
            names = [name for name, _, _ in rows]
            wrong.update({"files missing": len(set(files) - set(names)),
                          "files doubled": len(names) - len(set(names)),
                          "files empty": sum(not size for _, size, _ in rows),
                          "files changed": sum(bool(size) and files.get(name) != data
                                               for name, size, data in rows)})
    return {what: int(count) for what, count in wrong.items() if count}


class QueueCase(Case):
    """A test with a sandbox and the queue file self.path, that TOFUPILOT_QUEUE names."""
    forge, files = None, {"a.txt": b"a" * 70000, "b.txt": b"b"}

    @classmethod
    def setUpClass(cls):
        cls.forge = Forge() if Forge.there else None

    @classmethod
    def tearDownClass(cls):
        if cls.forge:
            cls.forge.close()

    def setUp(self):
        super().setUp()
        self.use(self.box)
        self.attach = ["--attach"] + [self.file(name, data) for name, data in self.files.items()]

    def use(self, box, name="line"):
        """From now on commands go to this sandbox, with another queue file."""
        self.box, self.path = box, self.at(name + ".queue")
        self.env.update(TOFUPILOT_URL=box.url, TOFUPILOT_API_KEY=box.user_key,
                        TOFUPILOT_QUEUE=self.path)

    def do(self, *argv, status=0, env=None, box=None, **more):
        """Runs a command line in the forge (in a process of its own without fork) -> Ran."""
        env = dict(self.env, **(env or {}))
        if box:
            env.update(TOFUPILOT_URL=box.url, TOFUPILOT_API_KEY=box.user_key)
        if more and not self.forge:
            self.skipTest("needs fork")
        ran = self.forge.run(self.folder, env, argv, **more) if self.forge else (
            self.run_script(*argv, env=env))
        if status is not None:
            self.assertEqual(ran.status, status, (argv, ran))
        if ran.status >= 0:
            self.assertNotRegex(ran.err, "Traceback|unexpected")
        return ran

    def until_done(self, step, least):
        """step(n) with n = 1, 2, ... is killed at its n-th point, until it comes to its end."""
        for number in range(1, 999):
            ran = step(number)
            if ran.status != -9:
                break
        self.assertEqual(ran.status, 0, ran)
        self.assertGreater(number, least)

    def offline(self, *serials):
        for serial in serials:
            self.do(*create(serial, "--offline"))

    def with_files(self, serial):
        """Stores a run with self.files -> its command line."""
        words = create(serial, "--offline", *self.attach)
        self.do(*words)
        return words

    def listed(self, *more):
        """What queue ls --json shows of the entries."""
        return self.do("queue", "ls", "--json", *more).json["data"]

    def sql(self, statement, *values, path=None):
        with contextlib.closing(sqlite3.connect(path or self.path)) as db, db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(statement, values)]

    def states(self, path=None):
        """How many entries are in each state."""
        return dict(collections.Counter(row["state"] for row in self.sql(
            "SELECT state FROM entry", path=path)))

    def posts(self, field="serial_number"):
        """What the creates said that arrived, in their order."""
        return [json.loads(record.body.decode())[field] for record in self.box.requests
                if (record.method, record.path) == ("POST", "/api/v2/runs")]

    def when(self, serial, *fault, **options):
        """A fault for the creates of one serial."""
        def strike(record):
            if record.method == "POST" and b'"%s"' % serial.encode() in (record.body or b""):
                self.box.fault(*fault, match="POST /v2/runs", **options)
        self.box.on_request = strike

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
            self.do("queue", how, "--queue", path)
        self.intact(*serials, **with_files)


class Queueing(QueueCase):
    def test_a_create_with_a_queue_is_sent_at_once(self):
        del self.env["TOFUPILOT_QUEUE"]
        first = self.do(*create("A", "--queue", self.path, "--json")).json
        self.assertEqual(first, {"id": first["id"], "queued": False, "client_run_ref":
                                 self.sql("SELECT ref FROM entry")[0]["ref"]})
        self.assertEqual(self.do(*create("A", "--queue", self.path, "-q")).out, first["id"] + "\n")
        self.assertIn(first["id"], self.do(*create("A", "--queue", self.path)).out)
        self.assertEqual((self.posts(), self.states()), (["A"], {"sent": 1}))

    def test_without_a_network_it_is_queued_and_the_next_create_sends_all(self):
        dead = {"TOFUPILOT_URL": CLOSED}
        said = self.do(*create("A", "--json"), env=dead).json
        self.assertEqual((said["id"], said["queued"]), (None, True))
        self.assertEqual(self.do(*create("B", "-q"), env=dead).out, "")
        self.assertIn("Queued", self.do(*create("B"), env=dead).out)
        self.assertEqual(self.sql("SELECT state, origin FROM entry"),
                         [{"state": "waiting", "origin": None}] * 2)
        self.do(*create("C"))
        self.assertEqual(self.posts(), ["A", "B", "C"])

    def test_offline_stores_without_a_key_in_a_file_that_is_marked_and_private(self):
        del self.env["TOFUPILOT_API_KEY"], self.env["TOFUPILOT_URL"]
        self.offline("A")       # what it loads: SmallPromises
        if POSIX:
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        for pragma, value in (("application_id", 0x54465251), ("user_version", 1),
                              ("auto_vacuum", 2)):
            self.assertEqual(self.sql("PRAGMA " + pragma), [{pragma: value}])
        self.assertEqual((self.states(), self.box.connections), ({"waiting": 1}, 0))

    def test_without_a_name_the_queue_is_in_the_home(self):
        del self.env["TOFUPILOT_QUEUE"]
        self.offline("A")
        self.assertEqual(self.states(self.at("home", "runs.queue")), {"waiting": 1})
        self.do(*create("B"))      # no queue was asked for
        self.assertEqual(self.posts(), ["B"])
        self.do("queue", "send")
        self.intact("A", "B")

    def test_the_same_create_is_one_entry_and_more_files_add_what_lacks(self):
        _, a, b = self.attach
        for more in ((a,), (a,), (b,), (a, b)):
            self.do(*create("A", "--offline", "--attach", *more))
        self.assertEqual([row["attachments"] for row in self.listed()], [2])
        self.do("queue", "send")
        self.intact(A=self.files)
        self.do(*create("A", "--attach", a, self.file("c.txt")))
        self.intact(A=dict(self.files, **{"c.txt": b"content\n"}))
        self.assertEqual(self.posts(), ["A"])

    def test_a_receipt_answers_for_its_origin_and_for_no_other(self):
        run_id = self.do(*create("A", "-q", *self.attach)).out
        self.box.fault("drop-before", times=None)
        self.box.requests.clear()
        self.assertEqual(self.do(*create("A", "-q")).out, run_id)
        self.assertEqual(self.box.requests, [])
        other = self.another()
        self.assertFalse(self.do(*create("A", "--json", *self.attach), box=other).json["queued"])
        self.intact(box=other, A=self.files)

    def test_ls_get_rm_send_and_retry_print_the_documents_that_are_promised(self):
        self.do(*create("A", "--offline", "--client-run-ref", "ref-1", *self.attach))
        self.do(*create("B", "--offline", "--client-run-ref", "ref-2", outcome="FAIL"))
        found = self.do("queue", "ls", "--json").json
        self.assertEqual(found["meta"], {"file": self.path, "parked": 0, "sent": 0, "waiting": 2,
                                         "bytes": os.path.getsize(self.path)})
        row = found["data"][0]
        self.assertLess(abs(runs.epoch(row["stored_at"]) - time.time()), 60)
        self.assertEqual(dict(row, stored_at=0, next_try_at=0), {
            "client_run_ref": "ref-1", "state": "waiting", "outcome": "PASS", "tries": 0,
            "serial_number": "A", "procedure_id": "proc_abc", "stored_at": 0, "next_try_at": 0,
            "error": None, "run_id": None, "attachments": 2})
        self.assertEqual(self.do("queue", "get", "ref-1", "--json").json, dict(
            BODY, serial_number="A", client_run_ref="ref-1"))
        for status, ref in ((2, "ref"), (4, "x"), (4, "ref-11"), (0, "ref-2")):
            self.do("queue", "rm", ref, status=status)
        found = self.do("queue", "send", "--json").json
        row, = self.listed("--sent")
        self.assertEqual(row["state"], "sent")
        self.assertEqual(found, {"sent": 1, "waiting": 0, "parked": 0, "runs": [
            {"client_run_ref": "ref-1", "id": row["run_id"]}]})
        self.assertEqual(self.listed(), [])
        self.assertEqual(self.do("queue", "retry", "--json").json,
                         {"sent": 0, "waiting": 0, "parked": 0, "runs": []})
        self.intact(A=self.files)

    def test_get_feeds_a_create_and_saves_the_files(self):
        self.do(*create("A", "--offline", "--set", "shift=A", *self.attach))
        ref = self.listed()[0]["client_run_ref"]
        body = self.do("queue", "get", ref[:6], "--json").out
        self.do("queue", "get", ref[:6], "--download", "saved")
        self.assertEqual(content(self.at("saved", "a.txt")), self.files["a.txt"])
        self.assertEqual(self.ok("create", "--body", "-", "--json", input=body.encode()).json[
            "client_run_ref"], ref)
        self.intact(A=self.files)

    def test_no_queue_file_is_exit_4_with_its_full_path(self):
        for command in (["send"], ["retry"], ["ls"], ["get", "x"], ["rm", "x"], ["move", "y"]):
            ran = self.do("queue", *(command + ["--queue", "typo.queue"]), status=4)
            self.assertIn(self.at("typo.queue"), ran.err)
        self.assertEqual([name for name in os.listdir(self.folder) if "queue" in name], [])

    def test_a_second_sender_says_so_and_leaves(self):
        """Control: with the lock patched away the second one sends too: twice, on an old server."""
        self.box.store.knows_ref = False
        for serial, patch in (("A", ""), ("AA", NO_LOCK + NO_LOOK)):
            arrived, go_on = threading.Event(), threading.Event()
            self.offline(serial)
            self.box.on_request = lambda record: record.method == "POST" and not arrived.is_set() \
                and (arrived.set() or go_on.wait(30))
            first = self.start("queue", "send")
            self.assertTrue(arrived.wait(30))
            second = self.do("queue", "send", **({"patch": patch} if patch else {}))
            go_on.set()
            self.ended(first, 0)
            self.assertEqual("another process" in second.out + second.err, not patch)
            self.assertEqual(len(on_server(self.box)[serial]), len(serial))

    def test_a_parked_run_keeps_saying_5_until_somebody_deals_with_it(self):
        self.offline("A")
        self.box.fault("status", "POST /v2/runs", status=422, body={"message": "bad\x1b[31m"})
        self.assertNotIn("\x1b", self.do("queue", "send", status=5).out)
        self.assertEqual(self.do("queue", "send", "--json", status=5).json,
                         {"sent": 0, "waiting": 0, "parked": 1, "runs": []})
        self.assertIn("parked", self.do(*create("B")).err)
        self.assertIn("bad", self.listed()[0]["error"])
        self.assertEqual(self.posts(), ["A", "B"])
        self.delivered("A", "B")
        self.assertEqual(self.do("queue", "send").err, "")

    def test_a_run_begun_elsewhere_waits_and_is_told_each_time(self):
        """Its first server may have it. Control: without unsent.append the exit status is 0."""
        self.box.fault("drop-after", "POST /v2/runs")
        self.do(*create("A"))
        other = self.another()
        self.assertRegex(self.do("check", box=other, status=6).out, "FAIL  queue .*begun at")
        for command, said in ("send", "waiting A: begun at "), ("retry", "begun at "):
            self.assertIn(said + self.box.url, self.do("queue", command, box=other, status=6).out)
        self.assertEqual(on_server(other), {})
        self.delivered("A")

    def test_an_upload_whose_end_was_not_answered_is_not_made_again(self):
        """Control: without the save() between initialize and PUT it is."""
        self.with_files("A")
        self.box.fault("status", "POST /v2/attachments/{id}/finalize")
        self.do("queue", "send", status=6)
        self.delivered(A=self.files)
        self.assertEqual(len(self.sent("PUT")), len(self.files))

    def test_what_waits_for_its_time_is_told_with_the_time(self):
        self.offline("A")
        self.box.fault("status", "POST /v2/runs", status=503, headers={"Retry-After": "3000"})
        self.do("queue", "send", status=6)
        self.assertRegex(self.do("queue", "send").out, r"\d 0 sent, 1 waiting, 0 parked; "
                         r"next try in \d+m")

    def test_a_large_file_goes_through_in_short_transactions_and_the_room_comes_back(self):
        """Control: one transaction (no COMMIT in copy_in) or auto_vacuum 0."""
        big = {"big.bin": os.urandom(1 << 20) * 24}
        self.offline("small")
        before, held = os.path.getsize(self.path), AT_STATEMENT % """sql == "COMMIT": seen[0] = 0
    seen[0] += sum(len(value) for value in args if type(value) is bytes)
    if seen[0] > 17 << 20: raise SystemExit("a transaction of more than 17 MiB")"""
        path = self.file("big.bin", big["big.bin"])
        self.do(*create("A", "--offline", "--attach", path), patch=held)
        self.assertGreater(os.path.getsize(self.path), 24 << 20)
        self.do("queue", "send")
        self.assertLess(os.path.getsize(self.path), before + (1 << 16))
        self.intact("small", A=big)


class QueueAnswers(QueueCase):
    """The table of answers: what waits, what is parked, what ends the pass."""

    def test_each_answer_has_its_state_its_wait_and_its_effect(self):
        away, denied, bad, gone = runs.Unavailable, runs.AccessDenied, runs.Refused, runs.NotFound
        sub, day = "Sub-unit with serial number X does not exist.", 86400
        for kind, status, asked, tries, unit, said, state, least, most, effect in (
                (away, None, None, 5, None, "", "waiting", 0, 0, "end"),
                (runs.NotTheAPI, 200, None, 0, None, "", "waiting", 0, 0, "end"),
                (runs.NotTheAPI, 404, None, 0, None, sub, "waiting", 0, 0, "end"),
                (denied, 401, None, 0, None, "", "waiting", 0, 0, "end"),
                (denied, 403, None, 9, None, "", "waiting", 3600, 3600, "count"),
                (away, 429, None, 2, None, "", "waiting", 0, 60, "end"),
                (away, 429, 100, 0, None, "", "waiting", 100, 200, "end"),
                (away, 503, None, 0, None, "", "waiting", 0, 15, "end"),
                (away, 503, 3600, 0, None, "", "waiting", 3600, 3600, "end"),
                (away, 408, None, 1, None, "", "waiting", 0, 30, "go on"),
                (away, 425, 5, 1, None, "", "waiting", 5, 10, "go on"),
                (away, 500, None, 30, None, "", "waiting", 0, 3600, "count"),
                (away, 502, None, 3, None, "", "waiting", 0, 120, "count"),
                (gone, 404, None, 0, 0, "", "parked", 0, 0, "go on"),
                (gone, 404, None, 0, None, sub, "parked", 0, 0, "go on"),
                (gone, 404, None, 0, 0, sub, "waiting", 900, 900, "go on"),
                (bad, 400, None, 2, day, sub, "waiting", 3600, 3600, "go on"),
                (bad, 400, None, 99, day, sub, "waiting", 21600, 21600, "go on"),
                (bad, 400, None, 9, 3 * day + 1, sub, "parked", 0, 0, "go on"),
                (bad, 409, None, 0, None, "", "parked", 0, 0, "go on"),
                (bad, 422, None, 0, 0, "", "parked", 0, 0, "go on")):
            error = kind("the server said no", status=status, issues=[said])
            error.retry_after = asked
            for _ in range(50):
                found = runs.after_failure(error, tries, unit)
                self.assertEqual((found[0], found[2]), (state, effect), (status, tries, said))
                self.assertTrue(least <= found[1] <= most, (status, tries, said, found))

    def test_a_pass_does_what_the_answer_asks_for(self):
        """What the server answers to the sixth of some entries, and what becomes of all."""
        html = {"status": 404, "body": b"<p>", "headers": {"Content-Type": "text/html"}}
        for name, kind, options, count, status, posts, sent, parked in (
                ("401", "status", {"times": None, "status": 401}, 9, 3, 6, 5, 0),
                ("three 403", "status", {"times": None, "status": 403}, 9, 3, 8, 5, 0),
                ("one 500", "status", {"status": 500}, 20, 6, 20, 19, 0),
                ("one 422", "status", {"status": 422}, 20, 5, 20, 19, 1),
                ("one 408", "status", {"status": 408}, 9, 6, 9, 8, 0),
                ("three 502", "status", {"times": None, "status": 502}, 9, 6, 8, 5, 0),
                ("429", "status", {"status": 429}, 9, 6, 6, 5, 0),
                ("503", "status", {"status": 503}, 9, 6, 6, 5, 0),
                ("portal", "portal", {"times": None}, 9, 6, 6, 5, 0),
                ("redirect", "redirect", {"times": None, "location": "/x"}, 9, 6, 6, 5, 0),
                ("HTML 404", "status", dict(html, times=None), 9, 6, 6, 5, 0),
                ("HTML 403", "status", dict(html, times=None, status=403), 9, 6, 6, 5, 0),
                ("drop", "drop-before", {"times": None}, 9, 6, 7, 5, 0),    # a dead kept connection
                ("cut", "cut", {"times": None}, 9, 6, 6, 5, 0)):
            self.use(self.another(), name)
            serials = [f"S{number}" for number in range(count)]
            self.offline(*serials)
            self.when("S5", kind, **options)
            found = self.do("queue", "send", "--json", status=status).json
            self.assertEqual((self.posts()[:6], len(self.posts())), (serials[:6], posts), name)
            self.assertEqual((found["sent"], found["waiting"], found["parked"]),
                             (sent, count - sent - parked, parked), name)
            self.delivered(*serials)

    def test_one_procedure_that_is_not_linked_stops_nobody(self):
        """Control: with "403 ends the pass" in after_failure nothing after it goes out."""
        self.env["TOFUPILOT_API_KEY"] = self.box.station_key
        for number in range(20):
            self.do(*create(f"S{number}", "--offline", procedure=(
                "proc_abc" if number != 5 else self.box.unlinked_procedure_id)))
        found = self.do("queue", "send", "--json", status=3).json
        self.assertEqual((found["sent"], found["waiting"], found["parked"]), (19, 1, 0))
        row, = self.sql("SELECT *, next_try_at - failed_at AS wait FROM entry WHERE run_id IS NULL")
        self.assertEqual((row["serial_number"], row["wait"]), ("S5", 3600))

    def test_retry_after_is_respected_by_the_next_pass(self):
        self.offline("A", "B")
        self.box.fault("status", "POST /v2/runs", status=429, headers={"Retry-After": "120"})
        self.do("queue", "send", status=6)
        row = self.sql("SELECT next_try_at - failed_at AS wait FROM entry")[0]
        self.assertTrue(120 <= row["wait"] <= 240, row)
        self.do("queue", "send")
        self.assertEqual(self.posts(), ["A", "B"])
        self.delivered("A", "B")

    def test_a_sub_unit_may_come_later_from_here_or_from_another_station(self):
        for number, first in enumerate(("sub-unit", "parent", "elsewhere")):
            parent, sub = f"P{number}", f"U{number}"
            self.offline(*[sub] * (first == "sub-unit"))
            self.do(*create(parent, "--offline", "--sub-units", sub))
            self.offline(*[sub] * (first == "parent"))
            if first == "sub-unit":
                self.when(sub, "status", status=500)
            self.do("queue", "send", status=6 if first == "sub-unit" else 5)
            self.calm()
            if first == "elsewhere":
                row, = self.sql("SELECT * FROM entry WHERE serial_number = ?", parent)
                self.assertEqual(row["next_try_at"] - row["failed_at"], 900)
                self.do(*create(sub), env={"TOFUPILOT_QUEUE": "other.queue"})
            self.do("queue", "retry", status=None)
            self.do("queue", "retry")
            self.assertEqual(len(on_server(self.box)[parent]), 1, first)
        self.do(*create("P4", "--offline", "--sub-units", "never"))
        self.sql("UPDATE entry SET stored_at = stored_at - 73 * 3600")
        self.do("queue", "send", status=5)
        self.assertEqual(self.states()["parked"], 1)

    def test_runs_of_one_unit_keep_their_order_and_parked_ones_block_nobody(self):
        self.offline("A", "B")
        self.do(*create("A", "--offline", outcome="FAIL"))
        self.do(*create("a", "--offline", outcome="ERROR"))
        self.when("A", "status", status=500)
        self.do("queue", "send", status=6)
        self.assertEqual(self.posts(), ["A", "B"])
        self.when("A", "status", status=422)
        self.do("queue", "retry", status=5)
        self.assertEqual(self.posts("outcome")[2:], ["PASS", "FAIL", "ERROR"])

    def test_an_entry_begun_elsewhere_waits_and_says_where(self):
        self.offline("A", "B")
        self.box.fault("drop-after", "POST /v2/runs")
        self.do("queue", "send", status=6)
        other = self.another()
        self.do("queue", "retry", box=other, status=None)
        self.intact("B", box=other)
        row, = self.listed()
        self.assertIn(self.box.url, row["error"])
        self.do("queue", "send")
        self.intact("A")

    def test_a_clock_that_jumps_never_makes_a_wait_longer_than_its_cap(self):
        """Control: a plain now >= next_try_at waits for a year after a jump of -1 y."""
        year, now = 365 * 86400, 1.7e9
        for passed, due in ((0, False), (3601, True), (year, True), (-year, True), (-7200, True),
                            (-30, False)):
            self.assertEqual(bool(runs.is_due({"failed_at": now, "next_try_at": now + 3600},
                                              now + passed)), due, passed)
        self.assertTrue(runs.is_due({"failed_at": None, "next_try_at": 0}, now))
        for number, jump in enumerate((-year, -7200, year)):
            self.offline(f"A{number}")
            self.box.fault("status", "POST /v2/runs", status=403)
            self.do("queue", "send", status=3)
            self.sql("UPDATE entry SET failed_at = failed_at - ?, next_try_at = next_try_at - ?, "
                     "stored_at = stored_at - ? WHERE state = 'waiting'", jump, jump, jump)
            self.do("queue", "send")
        self.intact("A0", "A1", "A2")


@unittest.skipUnless(Forge.there, "the kills need fork")
class ExactlyOnce(QueueCase):
    """A run is on the server once and with all its files, whatever is lost or killed."""
    place = RAM

    def test_a_lost_answer_makes_no_second_run(self):
        """Control: where it does not look before it sends again, an old server gets it twice."""
        expected = {}
        for (kind, options), more in itertools.product(
                (("drop-after", {}), ("reset", {"after": True}), ("cut", {}),
                 ("slow", {"delay": 9})), ([], ["--offline"])):
            serial = kind + "".join(more)
            expected[serial] = self.files
            self.box.fault(kind, "POST /v2/runs", **options)
            self.do(*create(serial, "--timeout", "0.2", *(more + self.attach)))
            self.do("queue", "send", "--timeout", "0.2", status=None)
            self.calm()
            self.do("queue", "retry")
        self.intact(**expected)
        self.box.fault("drop-after", "POST /v2/runs")
        self.do(*create("control"), patch=NO_LOOK)
        self.do("queue", "retry", patch=NO_LOOK)
        self.assertEqual(len(on_server(self.box)["control"]), 2 - self.box.store.knows_ref)

    def test_twins_are_two_runs_and_stay_two(self):
        """Control: a same_run that compares less (not metadata, say) adopts the other one."""
        for number, more in enumerate((["--set", "x=1"], ["--set", "x=2"], [],
                                       ["--docstring", "d"], ["--operated-by", "Eve"])):
            self.box.fault("drop-after", "POST /v2/runs")
            self.do(*create("A", "--offline", *more))
            self.do("queue", "send", status=6)
            self.do("queue", "retry")
            self.assertEqual(len(on_server(self.box)["A"]), number + 1)
        self.box.fault("drop-before", "POST /v2/runs")
        self.do(*create("A", "--set", "x=3"))
        self.do("queue", "retry", patch="runs.same_run = lambda row, body: True")
        self.assertEqual(len(on_server(self.box)["A"]), 6)   # those of other entries are known

    def test_a_twin_is_not_adopted_when_a_kept_connection_is_dead(self):
        """Control: with the runs of other entries unknown, the second run is lost.

        An old server shows no phases in a row, so these two differ in nothing that a look sees.
        """
        for name in ("one", "two"):
            self.do(*create("A", "--offline", "--phases", json.dumps([{
                "name": name, "outcome": "PASS", "started_at": "2026-05-19T08:00:00Z",
                "ended_at": "2026-05-19T08:00:01Z"}])))
        with Sandbox(knows_ref=False) as box:
            self.use(box)
            box.fault("drop-before", "POST /v2/runs", skip=1)
            self.do("queue", "send")
            self.assertEqual(len(on_server(box)["A"]), 2)

    def kill_at_request(self, number, drop, *argv):
        """Runs a command line that is killed when its request of this number arrives -> Ran."""
        known, seen = threading.Event(), []

        def strike(record):
            seen.append(record)
            if len(seen) == number:
                known.wait(30)
                os.kill(pid, signal.SIGKILL)
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
        for command, drop in itertools.product(("create", "send"), (False, True)):
            def step(number):
                serial = f"{command}-{drop}-{number}"
                expected[serial] = self.files
                words = create(serial, *self.attach)
                if command == "send":
                    self.do(*(words + ["--offline"]))
                    words = ["queue", "send"]
                ran = self.kill_at_request(number, drop, *words)
                self.do("queue", "retry")
                return ran
            self.until_done(step, 8)
        self.intact(**expected)
        self.assertEqual(self.states(), {"sent": len(expected)})

    def test_a_kill_at_any_statement_of_send_loses_and_doubles_nothing(self):
        """Control: without the look some are there twice on the server that knows no ref."""
        for patch in ("", NO_LOOK)[:2 - self.box.store.knows_ref]:
            expected = {}

            def step(number):
                serial = f"{'BA'[not patch]}{number}"
                expected[serial] = self.files
                self.with_files(serial)
                ran = self.do("queue", "send", patch=patch + KILL, n=number, status=None)
                self.do("queue", "retry", patch=patch)
                return ran
            self.until_done(step, 15)
            found = account({serial: rows for serial, rows in on_server(self.box).items()
                             if serial in expected}, expected)
            if patch:       # only the second one has the files
                self.assertTrue(found.pop("doubled", 0) and found.pop("files missing"))
            self.assertEqual(found, {})


class ExactlyOnceOnAnOldServer(ExactlyOnce):
    """The same on a server that does not know client_run_ref."""
    options = {"knows_ref": False}

    def test_a_look_that_is_refused_is_no_answer_and_nothing_is_sent_again(self):
        """Control: with only Unavailable caught round the look the run doubles."""
        for number, status in enumerate((401, 403, 404, 503)):
            self.offline(f"A{number}")
            self.box.fault("drop-after", "POST /v2/runs", times=None)
            self.box.fault("status", "GET /v2/runs", times=None, status=status)
            ran = self.do("queue", "send", "--retries", "1", status=None)
            self.assertIn("may be stored", ran.out)
            self.calm()
            self.do("queue", "retry")
        self.intact("A0", "A1", "A2", "A3")

    def test_serials_that_differ_in_case_are_two_runs(self):
        """Control: compared as they are, the second adopts the run of the first."""
        self.offline("sn1", "SN1")
        self.do("queue", "send")
        self.assertEqual(len(self.stored()), 2)
        self.offline("sn2", "SN2")
        self.box.fault("drop-before", "POST /v2/runs", skip=1)
        self.do("queue", "send", status=None)
        self.do("queue", "retry")
        self.assertEqual(len(self.stored()), 4)

    def test_a_move_brings_the_doubt_about_a_run_along(self):
        """Control: without tried_at in what enter() merges it is sent twice."""
        words = create("A", "--offline")
        for path in self.path, "stick":
            self.do(*words, "--queue", path)
        self.box.fault("drop-after", "POST /v2/runs")
        self.do("queue", "send", status=6)
        self.do("queue", "move", "stick")
        self.delivered("A", at=["stick"])


@unittest.skipUnless(Forge.there, "the kills need fork")
class KilledWhileStoring(QueueCase):
    """An entry is whole in one file, or in none."""
    place = RAM

    def test_a_kill_at_any_statement_of_create_offline_stores_all_or_nothing(self):
        """Control: without the state storing (or the transaction) half an entry can be sent."""
        expected = {}

        def step(number):
            serial = f"A{number}"
            expected[serial] = self.files
            words = create(serial, "--offline", *self.attach)
            ran = self.do(*words, patch=KILL, n=number, status=None)
            if number % 5 == 0:     # a sender comes between
                self.do("queue", "send", status=None)
            self.do(*words)
            self.assertEqual(len(self.sql("SELECT 1 FROM entry WHERE serial_number = ? AND "
                                          "state != 'storing'", serial)), 1)
            return ran
        self.until_done(step, 20)
        self.do("queue", "send")
        self.intact(**expected)

    def kill_move(self, number, patch=""):
        """A move of two runs that is killed at a statement -> (Ran, the refs that can be sent)."""
        self.one, self.two = [self.at(f"{name}{number}.queue") for name in "12"]
        self.env["TOFUPILOT_QUEUE"] = self.one
        self.offline(f"A{number}")
        self.with_files(f"B{number}")
        ran = self.do("queue", "move", self.two, n=number, status=None, patch=patch + KILL)
        found = [row for path in (self.one, self.two) if os.path.exists(path) and self.sql(
            "SELECT 1 FROM sqlite_master", path=path) for row in self.sql(
            "SELECT ref, state FROM entry WHERE state IN ('waiting', 'moving')", path=path)]
        self.assertEqual(len({row["ref"] for row in found}), 2)
        return ran, [row["ref"] for row in found if row["state"] == "waiting"]

    def test_a_kill_at_any_statement_of_move_leaves_each_run_in_one_file(self):
        """After each kill a run is in one file at least, and can be sent from one at most.

        Control: a move without the mark (the state stays waiting) can be sent from both.
        """
        expected = {}

        def step(number):
            expected.update({f"A{number}": {}, f"B{number}": self.files})
            ran, sendable = self.kill_move(number)
            self.assertEqual(len(sendable), len(set(sendable)))
            self.do("queue", "move", self.two)
            self.assertEqual((self.states(self.one), self.states(self.two)),
                             ({"moved": 2}, {"waiting": 2}))
            self.do("queue", "send", "--queue", self.two)
            return ran
        self.until_done(step, 20)
        self.do(*create("A1"), env={"TOFUPILOT_QUEUE": self.at("11.queue")})
        self.intact(**expected)     # the create was answered by the receipt
        no_mark = """
marked = runs.Queue.sql
runs.Queue.sql = lambda self, sql, *values: marked(self, sql.replace(
    "state = 'moving', target", "target").replace(
    "state = 'moving'", "state = 'waiting' AND target IS NOT NULL"), *values)
"""
        for number in range(25, 99):
            _, sendable = self.kill_move(number + 900, no_mark + "n -= 900\n")
            if len(sendable) > len(set(sendable)):
                return
        self.fail("the control did not fail")


class Crowd(QueueCase):
    """Several processes at one queue file."""
    place = RAM

    def test_four_senders_and_sixteen_writers_bring_each_run_to_the_server_once(self):
        """Control: with the senders' lock patched away entries are sent by several."""
        self.box.store.knows_ref = False
        serials = [f"A{number}" for number in range(16)]
        self.offline("A0")
        crowd = [self.start(*create(serial, *["--offline"][number % 2:]))
                 for number, serial in enumerate(serials)]
        crowd[4:4] = [self.start("queue", "send") for _ in range(4)]
        for process in crowd:
            self.ended(process, 0)
        self.do("queue", "send")
        self.intact(*serials)
        self.assertEqual(self.states(), {"sent": 16})

    @unittest.skipUnless(Forge.there, "needs fork")
    def test_two_creates_of_one_request_at_a_time_are_one_entry_and_one_run(self):
        self.box.store.knows_ref = False
        forges = [self.forge, Forge()]
        self.addCleanup(forges[1].close)
        for number in range(20):
            self.env["TOFUPILOT_QUEUE"] = self.path = self.at(f"{number % 4}.q")
            for forge in forges:
                forge.start(self.folder, self.env, create(
                    f"A{number}", *["--offline"][number % 2:]))
            for ran in [forge.end() for forge in forges]:
                self.assertEqual((ran.status, ran.err), (0, ""), ran)
            self.do("queue", "send")
            self.assertEqual(self.states(), {"sent": 1 + number // 4})
        self.intact(*[f"A{number}" for number in range(20)])


class BadDisk(QueueCase):
    """A queue that cannot be written: the run goes directly, or is told to be not stored."""
    place = RAM

    def broken(self):
        """(name, path) of what is no usable queue."""
        self.offline("old")
        data, foreign = content(self.path), self.at("foreign.db")
        newer = self.file("newer.queue", data)
        self.sql("PRAGMA user_version = 2", path=newer)
        self.sql("CREATE TABLE mine (x)", path=foreign)
        self.sql("PRAGMA user_version = 1", path=foreign)
        read_only = self.file("read only.queue", data)
        os.chmod(read_only, 0o400)
        os.mkdir("folder")
        return [("a folder", self.at("folder")), ("newer", newer),
                ("foreign", foreign),
                ("in no folder", self.at("missing", "x.queue")),
                ("text", self.file("notes.txt", b"Dear queue, this is no SQLite file.\n" * 9)),
                ("short", self.file("short", b"SQLite format 3")), ("zeros", self.file(
                    "zeros", bytes(5000))), ("cut", self.file("cut.queue", data[:4096])),
                ("damaged", self.file("damaged.queue", data[:100] + b"\xa5" * (len(data) - 100)))
                ] + [("read only", read_only)] * (POSIX and os.geteuid() != 0)

    def test_a_broken_queue_is_left_as_it_is_and_the_run_is_sent_directly(self):
        """Control: swallow the error of Queue(): exit 0 and no run."""
        for number, (name, path) in enumerate(self.broken()):
            before, queue, serial = content(path), {"TOFUPILOT_QUEUE": path}, f"A{number}"
            ran = self.do(*create(serial), env=queue)
            self.assertIn("Created", ran.out)
            self.assertRegex(ran.err, "warning.*" + re.escape(path))
            self.box.fault("drop-before", times=None)
            ran = self.do(*create("lost" + serial, *ONCE), env=queue, status=6)
            self.assertIn("NOT stored", ran.err)
            self.calm()
            ran = self.do(*create("off" + serial, "--offline", "--json"), env=queue, status=6)
            self.assertRegex(ran.error["message"], f"(?s){re.escape(path)}.*NOT stored")
            self.do("queue", "ls", env=queue, status=4 if name == "in no folder" else 6)
            self.assertEqual(content(path), before, name)
            self.assertEqual(len(on_server(self.box)), number + 1, name)

    def test_a_disk_that_fills_at_any_statement_leaves_what_is_stored(self):
        """The error of a full disk from each writing statement on, in create, send and move."""
        new = create("new", "--offline", "--attach", self.file("c.txt", b"c" * 200000))
        for command in (new, ["queue", "send"], ["queue", "move", "stick.queue"]):
            def step(number):
                for name in glob.glob("*queue*"):
                    os.unlink(name)
                self.offline("A", "B")
                ran = self.do(*command, patch=FULL_DISK, n=2 * number, status=None)
                self.assertIn(ran.status, (0, 6), ran)
                if command is new:
                    self.assertEqual("NOT stored" in ran.err, ran.status == 6)
                    self.assertEqual([row["serial_number"] for row in self.listed()],
                                     ["A", "B"] + ["new"] * (not ran.status))
                elif command[1] == "move":
                    self.do("queue", "move", "stick.queue")
                    self.do("queue", "retry", "--queue", "stick.queue")
                self.do("queue", "retry")
                return ran if ran.status == 0 else Ran(-9, "", "")
            self.until_done(step, 2)
        self.intact("A", "B", new={"c.txt": b"c" * 200000})

    @unittest.skipUnless(sys.platform == "linux" and os.geteuid() == 0, "mounting needs root")
    def test_a_full_tmpfs_keeps_what_is_stored_and_the_next_run_goes_directly(self):
        disk, roomy = [self.at(name) for name in ("disk", "roomy.queue")]
        os.mkdir(disk)
        if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk],
                           stderr=subprocess.DEVNULL):
            self.skipTest("mount does not work here")
        self.addCleanup(subprocess.call, ["umount", "-l", disk])
        self.env["TOFUPILOT_QUEUE"] = self.path = os.path.join(disk, "line.queue")
        expected = {}
        for number in range(9):
            ran = self.do(*create(f"A{number}", "--offline", *self.attach), status=None)
            self.assertEqual((ran.status, "NOT stored" in ran.err), (6, True) if ran.status else (
                0, False))
            expected.update({} if ran.status else {f"A{number}": self.files})
        self.assertTrue(1 <= len(expected) <= 5, expected)
        self.assertIn("warning", self.do(*create("direct", *self.attach)).err)
        self.do("queue", "move", roomy)
        with open(os.path.join(disk, "filler"), "wb", 0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1000)):
                pass
        os.truncate(filler.name, os.path.getsize(filler.name) - 80000)     # for the tables alone
        self.env["TOFUPILOT_QUEUE"] = roomy
        target = os.path.join(disk, "other.queue")
        self.do("queue", "move", target, status=6)
        self.assertEqual(len(self.listed()), len(expected))
        for path in (filler.name, self.path):
            os.unlink(path)
        self.do("queue", "move", target)
        self.do("queue", "send", "--queue", target)
        self.intact(direct=self.files, **expected)


class Stored(QueueCase):
    """Once it is stored nothing turns exit 0 into another."""

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_stdout_that_is_full_or_closed_after_the_commit_is_exit_0(self):
        command = ["sh", "-c", "", "sh", sys.executable, "-I", "-S", SCRIPT]
        for number, shell in enumerate(('"$@" > /dev/full', '"$@" >&-', '"$@" 2>&- >&-',
                                        '{ "$@"; echo $? >&2; } | :')):
            command[2] = shell
            for more in (["--offline"], ["--json"]):
                ran = self.ended(self.popen(
                    *command, *create(f"A{number}{len(more[0])}", *more)), 0)
                self.assertIn(ran.err, ("", "0\n"))
        self.assertEqual(self.states(), {"sent": 8})

    @unittest.skipUnless(POSIX, "needs signals")
    def test_ctrl_c_and_sigterm_after_the_commit_are_exit_0(self):
        for number, sign in enumerate((signal.SIGINT, signal.SIGTERM)):
            arrived, go_on = threading.Event(), threading.Event()
            self.box.on_request = lambda record: arrived.set() or go_on.wait(30)
            process = self.start(*create(f"A{number}", "--json"))
            self.assertTrue(arrived.wait(30))
            process.send_signal(sign)
            said = self.ended(process, 0).json
            go_on.set()
            self.assertEqual((said["id"], said["queued"]), (None, True))
            self.calm()
            self.do("queue", "retry")
        self.intact("A0", "A1")

    def test_nothing_that_happens_after_the_commit_is_told_as_a_failure(self):
        """Ctrl-C, or a queue that cannot be read any more, at each statement after the COMMIT."""
        self.offline("old")
        for (name, what), number in itertools.product((
                ("ctrl-c", "os.kill(os.getpid(), 2)"),
                ("locked", "raise self.unusable('database is locked')")), range(1, 6)):
            patch = AT_STATEMENT % (
                "sql == 'COMMIT': seen[0] = 1000\n    if seen[0] == 1000 + n: " + what)
            self.do(*create(f"{name}-{number}", "--offline"), n=number, patch=patch)
        self.assertEqual(self.states(), {"waiting": 11})

    def test_a_server_that_never_answers_holds_a_create_for_a_limited_time(self):
        """With ten seconds patched to half a second. Control: within() that waits to the end."""
        self.box.fault("slow", event=threading.Event(), times=None)
        started = time.monotonic()
        said = self.do(*create("A", "--json"), patch="kept = runs.within\nruns.within = "
                       "lambda seconds, work: kept(seconds / 20, work)").json
        self.assertLess(time.monotonic() - started, 9)      # else it is the time-out's 30
        self.assertTrue(said["queued"])
        self.delivered("A")


class Moving(QueueCase):
    def setUp(self):
        super().setUp()
        self.stick, self.third = self.at("stick"), self.at("third")

    def move(self, source, target, **more):
        return self.do("queue", "move", target, "--queue", source, **more)

    def kill_move(self, until):
        """Kills moves to the stick, each one statement later, until one has come so far."""
        for number in range(1, 99):
            self.move(self.path, self.stick, patch=KILL, n=number, status=-9)
            if until():
                break

    def test_runs_go_to_a_stick_and_on_and_back_and_never_twice(self):
        """Control: with `came` ignored, a run that comes back is refused by its own receipt."""
        words = self.with_files("A")
        stops = [self.path, self.stick, self.path, self.stick, self.third, self.path, self.third]
        for source, target in zip(stops, stops[1:]):
            self.assertIn("only copy", self.move(source, target).out)
            self.do(*words, env={"TOFUPILOT_QUEUE": source})      # its receipt answers
            self.assertEqual([path for path in set(stops) if os.path.exists(path)
                              and self.states(path).get("waiting")], [target])
            self.assertEqual(self.sql("PRAGMA auto_vacuum", path=target), [{"auto_vacuum": 2}])
        self.delivered(at=set(stops), how="send", A=self.files)

    def test_a_run_that_comes_back_before_its_move_is_finished_is_not_lost(self):
        """Killed between insert and end; the stick moves back; then the first move is repeated."""
        self.with_files("A")
        self.kill_move(lambda: os.path.exists(self.stick) and self.sql(
            "SELECT 1 FROM sqlite_master", path=self.stick) and self.states(self.stick))
        self.assertEqual((self.states(), self.states(self.stick)), ({"moving": 1}, {"waiting": 1}))
        for source, target in 2 * [(self.stick, self.path), (self.path, self.stick)]:
            self.move(source, target, status=None)
        self.delivered(at=(self.path, self.stick), how="send", A=self.files)

    def test_parked_runs_stay_and_nothing_waiting_is_exit_0(self):
        self.offline("A", "B")
        for status in (422, 503):
            self.box.fault("status", "POST /v2/runs", status=status)
        self.do("queue", "send", status=5)
        self.offline("C")
        self.move(self.path, self.stick)
        self.assertEqual(self.states(), {"parked": 1, "moved": 2})
        self.move(self.path, self.stick)
        self.move(self.path, self.path, status=2)
        self.delivered("A", "B", "C", at=(self.path, self.stick))

    def test_progress_comes_along(self):
        """The run is there and its files uploaded: the stick's sender links them, no more.

        Control: without the commit of upload ids (QueuedFile.save) they are uploaded again.
        """
        self.with_files("A")
        self.box.fault("status", "PATCH /v2/runs/{id}")
        self.do("queue", "send", status=6)
        self.move(self.path, self.stick)
        self.box.requests.clear()
        self.delivered(at=[self.stick], A=self.files)
        self.assertEqual([record for record in self.box.requests if record.method in (
            "POST", "PUT") and not record.path.endswith("finalize")], [])

    def test_a_move_is_finished_to_the_same_file_under_another_name_only(self):
        """Control: with the target known by its path a renamed stick is taken for another."""
        self.offline("A", "B")
        self.kill_move(lambda: self.states().get("moved"))
        self.assertEqual(self.states(), {"moved": 1, "moving": 1})
        self.assertIn("queue get REF", self.move(self.path, self.third, status=2).err)
        self.assertIn("1 moving", self.do("queue", "ls").err)
        self.assertIn("1 moving", self.do("queue", "send").out)
        self.assertRegex(self.do("check", status=6).out, "FAIL  queue .* 1 moving")
        self.assertEqual(self.posts(), [])
        os.rename(self.stick, self.stick + "-renamed")
        self.move(self.path, self.stick + "-renamed")
        self.assertEqual(self.states(), {"moved": 2})
        self.delivered("A", "B", at=[self.stick + "-renamed"], how="send")

    def test_a_full_stick_leaves_the_rest_waiting_and_says_how_many_went(self):
        """Control: with its old receipt on the stick taken for the run, the run stays moving."""
        self.offline("A")
        self.move(self.path, self.stick)
        self.move(self.stick, self.path)
        ran = self.move(self.path, self.stick, status=6, patch=AT_STATEMENT % (
            'sql[:17] == "INSERT INTO entry": raise self.unusable("database or disk is full")'))
        self.assertIn("0 of 1 run moved", ran.err)
        self.assertEqual((self.states(), self.states(self.stick)), ({"waiting": 1}, {"moved": 1}))
        self.delivered("A")

    def test_what_another_process_does_while_a_file_is_copied_loses_nothing(self):
        """A day-old run, half copied, when another is stored there.

        Control: with stored_at as the clock of storing rows, the other takes it for left behind.
        """
        self.do(*create("A", "--offline", "--attach", self.file("big", bytes(17 << 20))))
        self.sql("UPDATE entry SET stored_at = stored_at - 200000")
        other = f"""sql == "BEGIN IMMEDIATE" and "stick" in self.path and (
            seen.append(sql) or len(seen) == 4):
        import subprocess
        subprocess.check_call([sys.executable, runs.__file__] + {create("B", "--offline")})"""
        self.env["TOFUPILOT_QUEUE"] = self.stick
        self.move(self.path, self.stick, patch="import sys" + AT_STATEMENT % other)
        self.assertEqual(self.states(self.stick), {"waiting": 2})
        self.delivered("B", at=[self.stick], A={"big": bytes(17 << 20)})

    def test_a_sent_run_that_got_another_file_can_be_moved(self):
        """The first's bytes went with the receipt. Control: IndexError, for ever moving."""
        self.do(*create("A", self.attach[0], self.attach[1]))
        self.with_files("A")
        ref = self.listed()[0]["client_run_ref"]
        self.assertIn("went up already", self.do("queue", "get", ref, "--download", "d").err)
        self.assertEqual(os.listdir("d"), ["b.txt"])
        self.move(self.path, self.stick)
        self.do(*create("A", "--offline", "--queue", self.stick, *self.attach))
        self.assertEqual([row["attachments"] for row in self.listed("--queue", self.stick)], [2])
        self.delivered(at=[self.stick], A=self.files)

    def test_rm_during_a_pass_takes_what_it_names_and_no_more(self):
        """Control: without the look for a body that is gone, exit 1 and the rest stays."""
        self.offline("A", "B", "C")
        ref = self.listed()[1]["client_run_ref"]

        def remove(record):
            if record.method == "POST":
                self.box.on_request = None
                self.run_script("queue", "rm", ref, status=0)
        self.box.on_request = remove
        self.do("queue", "send")
        self.assertEqual((self.posts(), self.states()), (["A", "C"], {"sent": 2}))

    def test_a_killed_queue_is_fine_where_it_lies(self):
        """A journal is hot (killed amid a spilled transaction): opened in place it recovers."""
        self.offline("A")
        words = create("B", "--offline", "--attach", self.file("b", b"b" * 9000000))
        self.do(*words, n=90, status=-9, patch="import sqlite3" + AT_STATEMENT % """seen[0] == 5:
        real(self, "PRAGMA cache_size = 5")
    if seen[0] == n: os.kill(os.getpid(), 9)""")
        self.assertTrue(os.path.exists(self.path + "-journal"))
        self.move(self.path, self.stick)
        self.assertEqual(self.states(self.stick), {"waiting": 1})
        self.do(*words)
        self.do("queue", "send")
        self.intact(B={"b": b"b" * 9000000})


# ---- trials --------------------------------------------------------------------------------------

class Trial:
    """Random kills of creates, sends and moves at three queue files, on a server with faults."""
    files = {"one.txt": b"1", "some.txt": b"2" * 700, "more.bin": b"3" * 70000}

    def __init__(self, kills, seed, knows_ref, until):
        self.wanted, self.seed, self.until = kills, seed, until
        self.box, self.folder = Sandbox(knows_ref=knows_ref), tempfile.mkdtemp("", "trial-", RAM)
        self.kills, self.expected, self.bugs, self.lock = 0, {}, [], threading.Lock()
        self.queues = [os.path.join(self.folder, name + ".queue") for name in "abc"]
        self.env = {"TOFUPILOT_HOME": self.folder, "TOFUPILOT_URL": self.box.url,
                    "TOFUPILOT_API_KEY": self.box.user_key}
        for name, data in self.files.items():
            save(os.path.join(self.folder, name), data)

    def run(self):
        """All kills, then without faults all that waits -> dict of what is wrong."""
        with self.box, contextlib.closing(Forge()) as forge:
            self.box.keep = False
            self.box.chaos(0.25, self.seed, (*CHAOS, "portal"))
            with multiprocessing.pool.ThreadPool(2) as pool:
                pool.map(self.work, range(2))
            self.box.calm()
            self.drain(forge)
            found = account(on_server(self.box), self.expected)
        shutil.rmtree(self.folder, ignore_errors=True)
        return dict(found, bugs=len(self.bugs)) if self.bugs else found

    def one(self, forge, chance, words):
        """One command line, mostly killed; whether it came to its end with exit 0."""
        options = {} if self.kills >= self.wanted or not chance or chance.random() < 0.1 else (
            {"alarm": chance.uniform(0.001, 0.03)} if chance.random() < 0.6 else
            {"patch": KILL, "n": chance.randint(1, 60)})
        ran = forge.run(self.folder, self.env, words, **options)
        with self.lock:
            self.kills += ran.status in (-9, -14)
            if ran.status in (1, 99) or "Traceback" in ran.err:
                self.bugs.append(ran)
        return ran.status == 0

    def work(self, number):
        forge, chance, count = Forge(), random.Random(self.seed * 2 + number), 0
        while self.kills < self.wanted and time.time() < self.until:
            queue = ["--queue", chance.choice(self.queues)]
            doing = chance.random()
            if doing < 0.45:
                word = chance.choice(["send", "retry"] if doing < 0.25 else ["move"])
                target = [chance.choice(self.queues)] if word == "move" else []
                self.one(forge, chance, ["queue", word] + target + queue)
            else:
                serial, count = f"S{number}-{count}", count + 1
                names = chance.sample(sorted(self.files), chance.randint(0, 3))
                words = create(serial, *queue, *["--offline"][chance.random() < 0.5:],
                               *["--attach"][not names:], *names)
                with self.lock:
                    self.expected[serial] = {name: self.files[name] for name in names}
                for number_of_try in range(100):    # the operator runs the same command again
                    if self.one(forge, chance if number_of_try < 50 else None, words):
                        break
        forge.close()

    def drain(self, forge):
        """Finishes moves and sends until nothing waits."""
        for _ in range(20):
            waiting = 0
            for path in filter(os.path.exists, self.queues):
                with contextlib.closing(sqlite3.connect(path)) as db:
                    rows = db.execute("SELECT state, target FROM entry WHERE state IN ('waiting', "
                                      "'parked', 'moving')").fetchall()
                waiting += len(rows)
                for target in {row[1].partition(" ")[2] for row in rows if row[0] == "moving"}:
                    self.one(forge, None, ["queue", "move", target, "--queue", path])
                self.one(forge, None, ["queue", "retry", "--queue", path])
            if not waiting:
                break


def trials(argv):
    """Kills at random: half of them with a server that knows client_run_ref, half without."""
    parser = argparse.ArgumentParser(prog="test_tofupilot_runs.py trials",
                                     description=trials.__doc__)
    parser.add_argument("--kills", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="end after so long at the latest")
    args = parser.parse_args(argv)
    if not Forge.there:
        print("this system has no fork: the trials need Linux or macOS")
        return 1
    started, wrong, kills, count = time.time(), collections.Counter(), 0, 0
    for part, knows_ref in enumerate((False, True)):
        trial = Trial(args.kills // 2, args.seed + part, knows_ref,
                      started + 30 * (part + 1) * args.minutes)
        wrong.update(trial.run())
        kills, count = kills + trial.kills, count + len(trial.expected)
        for ran in trial.bugs[:3]:
            print(ran)
    print(f"{kills} kills, {count} runs in {time.time() - started:.0f} s: " + ", ".join(
        f"{wrong[what]} {what}" for what in ["lost", "doubled", "files missing", "files doubled",
                                             "files empty", "files changed", "unknown", "bugs"]))
    return 1 if wrong else 0


def fleet(jitter=True, asked=None, seed=1):
    """200 stations with 50 runs each after an outage: (seconds, ideal, share refused, peak rate).

    A simulated clock and the waiting rules of the script: cron begins a pass each minute with
    --jitter 60, a pass sends one run after the other (50 ms each) and ends at the first 429. The
    server takes 20 requests in each second and answers 429 to the others, with a Retry-After of
    `asked` seconds, or without one (None). jitter=False takes out all that is random.
    """
    chance, kept, seen, last = random.Random(seed), random.uniform, collections.Counter(), 0
    random.uniform = chance.uniform if jitter else lambda low, high: high
    error = runs.Unavailable("429", status=429)
    error.retry_after = asked

    def begin(minute):
        return 60 * minute + (runs.delay(0, 60) if jitter else 0)

    def station():
        """The moments of its requests; it is sent whether the server took each."""
        waiting = [{"next_try_at": 0, "failed_at": None, "tries": 0} for _ in range(50)]
        minute, now = 0, begin(0)
        while waiting:
            for entry in [entry for entry in waiting if runs.is_due(entry, now)]:
                if (yield now):
                    waiting.remove(entry)
                else:
                    _, wait, effect = runs.after_failure(error, entry["tries"], None)
                    entry.update(tries=entry["tries"] + 1, failed_at=now, next_try_at=now + wait)
                    if effect == "end":
                        break
                now += 0.05
            minute = max(minute + 1, int(now // 60))    # a running pass keeps the next out
            now = max(now, begin(minute))
    try:
        stations = [station() for _ in range(200)]
        events = [(next(sender), number) for number, sender in enumerate(stations)]
        heapq.heapify(events)
        while events:
            now, number = heapq.heappop(events)
            seen[int(now)] += 1
            taken = seen[int(now)] <= 20
            last = now if taken else last
            with contextlib.suppress(StopIteration):
                heapq.heappush(events, (stations[number].send(taken), number))
    finally:
        random.uniform = kept
    return last, 200 * 50 / 20, 1 - 10000 / sum(seen.values()), max(seen.values())


class Trials(unittest.TestCase):
    @unittest.skipUnless(Forge.there, "the kills need fork")
    def test_sixty_random_kills_lose_and_double_nothing(self):
        for knows_ref in (False, True):
            trial = Trial(30, 7, knows_ref, time.time() + 60)
            self.assertEqual(trial.run(), {}, trial.bugs)
            self.assertGreaterEqual(trial.kills, 30)

    def test_a_fleet_drains_in_one_and_a_half_times_the_ideal(self):
        """Control: without jitter and randomness it takes many times as long."""
        for asked in (None, 1, 10):
            seconds, ideal, refused, _ = fleet(asked=asked)
            self.assertLessEqual(seconds, 1.5 * ideal, asked)
            self.assertLess(refused, 0.25)
        seconds, ideal, refused, _ = fleet(jitter=False)
        self.assertGreater(seconds, 3 * ideal)
        self.assertGreater(refused, 0.5)


class SmallPromises(Case):
    """What people run into on the first days."""

    def test_dry_run_leaves_the_queue_as_it_is(self):
        self.ok(*CREATE, "--offline", *QUEUE)
        before = content("q")
        ran = self.ok("queue", "send", *QUEUE, "--dry-run")
        self.assertEqual([json.loads(line)["method"] for line in ran.out.splitlines()], ["POST"])
        for words in ("rm", "f"), ("move", "other"):
            self.assertIn("--dry-run", self.fails(2, "queue", *words, *QUEUE, "--dry-run").err)
        self.assertEqual((content("q"), self.sent()), (before, []))
        self.ok("queue", "send", *QUEUE)
        self.assertEqual(len(self.stored()), 1)

    def test_files_that_are_added_while_their_run_is_sent_go_too(self):
        """Control: without the look at the files in flush they are dropped with the receipt."""
        words = CREATE + ["--offline", *QUEUE]
        self.ok(*words)
        path = self.file("late.txt")

        def add(record):
            if record.method == "POST" and record.path == "/api/v2/runs":
                self.box.on_request = None
                self.ended(self.start(*words, "--attach", path), 0)
        self.box.on_request = add
        for _ in range(2):
            self.run_script("queue", "send", *QUEUE)
        self.assertEqual(self.attached(self.stored()[0]), ["late.txt"])
        self.assertEqual(self.ok("queue", "ls", *QUEUE, "-q").out, "")

    def test_one_reference_is_one_content_in_the_queue_too(self):
        mine = ("--client-run-ref", "mine", "--offline", *QUEUE)
        self.ok(*CREATE, *mine)
        self.ok(*CREATE, *mine)
        for sent in False, True:        # waiting, then a receipt
            self.assertIn("another run's", self.fails(2, *create("SN-2", *mine)).err)
            self.ok("queue", "send", *QUEUE)
        self.assertEqual(len(self.stored()), 1)

    def test_a_refused_run_can_be_had_back_corrected_and_sent(self):
        self.box.fault("status", "POST /v2/runs", status=422, body={"message": "no such part"})
        self.ok(*create("SN-9", "--attach", self.file("a.txt"), *QUEUE))
        row, = self.ok("queue", "ls", *QUEUE, "--json").json["data"]
        self.assertEqual((row["state"], "no such part" in row["error"]), ("parked", True))
        self.assertIn("FAIL  queue", self.fails(5, "check", *QUEUE).out)
        ref = row["client_run_ref"][:8]
        self.ok("queue", "get", ref, *QUEUE, *"--json --out fixed.json --download files".split())
        ran = self.ok(*"create --body @fixed.json --part-number P --attach".split(),
                      os.path.join("files", "a.txt"), *QUEUE)
        self.assertEqual(self.attached(ran.out.split()[2]), ["a.txt"])
        self.assertIn("Attached a.txt", ran.out)
        self.ok("queue", "rm", ref, *QUEUE)
        self.ok("queue", "send", *QUEUE)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "pty, links, modes and FIFOs are of POSIX")
    def test_out_keeps_what_is_there_and_rm_asks_on_a_terminal(self):
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
        self.ok(*CREATE, "--offline", *QUEUE)
        self.assertEqual(self.terminal("queue", "rm", "f", *QUEUE, answer=b"n\n")[0], 130)
        self.assertEqual(self.ok("queue", "ls", *QUEUE, "-q").out.count("\n"), 1)
        self.assertEqual(self.terminal("queue", "rm", "f", *QUEUE, answer=b"y\n")[0], 0)

    def test_an_id_of_a_wrong_form_is_not_found(self):
        id = self.made()
        for line in (f"get --id {id[:-1]}", "update-metadata --id x --set a=1",
                     "attachments finalize --id x", f"rm --ids {id} x"):
            self.assertIn("no ", self.fails(4, *line.split()).err)
        self.assertIn("no run x (400)", self.fails(4, "rm", "--ids", id, "x").err)
        self.assertEqual(self.stored(), [id])

    def test_a_key_file_of_any_editor_is_read_and_a_key_in_its_place_not_shown(self):
        key, self.env["TOFUPILOT_API_KEY"] = self.box.user_key, ""
        for encoding in "utf-8-sig", "utf-16", "utf-16-le":
            path = self.file("key", (key + "\r\n").encode(encoding))
            self.ok("ls", "--api-key-file", path)
        for more in (), QUEUE:          # stdin is read once, also for two clients
            self.ok(*create("K", "--api-key-file", "-", *more), input=key.encode())
        self.assertNotIn(key, self.fails(3, "ls", "--api-key-file", key).err)

    def test_errors_say_all_they_know(self):
        with self.assertRaisesRegex(runs.Unavailable, "cannot reach"):
            runs.Client(CLOSED, self.box.user_key, retries=0).list()
        with self.assertRaisesRegex(runs.BadInput, "serial_number: missing"):
            self.client().create(outcome="PASS")
        self.assertIn("FAIL  key", self.fails(3, "check", env={"TOFUPILOT_API_KEY": ""}).out)
        self.assertIn("queue move", self.fails(2, "queue").err)
        self.assertIn("queue move", self.ok("queue", "--help").out)
        self.box.fault("status", "POST /v2/runs", status=500, body={"message": "x"}, times=None)
        self.ok(*CREATE, *QUEUE)
        ran = self.fails(6, "queue", "retry", *QUEUE, "--json")
        self.assertEqual((ran.json["waiting"], ran.error["exit_code"]), (1, 6))

    def test_each_failure_has_its_message_its_object_and_its_status(self):
        id, path = self.made(), self.file("scope.png")
        self.file("run.json", json.dumps(BODY).encode())
        new, lost = " ".join(create("A")), [("drop-after", "POST /v2/runs"),
                                            ("status", "GET /v2/runs")]
        odd = dict(status=422, body={"message": "no", "issues": [
            {"path": ["phases", 1], "message": "odd"}]})
        for line, env, faults, status, message, hint in (
                ("ls --serial X", {}, (), 2, "unknown option --serial", "--serial-numbers"),
                ("create --body run.json", {}, (), 2, "is not JSON", "--body @run.json"),
                (f"{' '.join(UNIT)} --started-at 2026-05-19 --ended-at {END}", {}, (), 2,
                 "time of day", "correct"),
                ("update-metadata --id x --metadata {a:1}", {}, (), 2,
                 "is not JSON(.|\n)*removed the double quotes", "--set"),
                ("ls", {"TOFUPILOT_API_KEY": ""}, (), 3, "no API key", "--api-key-file"),
                ("ls", {"TOFUPILOT_API_KEY": "wrong-key-3f9c"}, (), 3, r"ending \.\.\.3f9c \(401\)",
                 "check the key"),
                (new, {}, [("status", "POST /v2/runs", odd)], 5, "422: no", "correct the data"),
                (new, {"TOFUPILOT_URL": CLOSED}, (), 6, "cannot reach",
                 "nothing was sent(.|\n)*--queue FILE"),
                (new, {}, lost, 6, "may be stored or not", "again"),
                ("get --id " + id[:-1], {}, (), 4, "no run " + id[:-1], "has 35 characters"),
                (" ".join(create("B", "--attach", path)), {}, [("status", "PUT .*")], 6,
                 r"is stored, 1 of 1 attachments not: scope\.png", "only what is missing")):
            for form in (), ("--json",):
                self.box.calm()
                for kind, match, *more in faults:
                    self.box.fault(kind, match, times=None, **dict(*more))
                ran = self.fails(status, *line.split(), *ONCE, *form, env=env)
                said, fix = ran.err, ran.err
                if form:
                    said, fix = ran.error["message"], ran.error["hint"]
                    self.assertEqual((ran.out, ran.error["type"], ran.error["exit_code"]),
                                     ("", "error", status))
                self.assertRegex(said, message)
                self.assertRegex(fix, hint)
                self.assertTrue(form or ran.err.startswith("error: ") and "Fix: " in ran.err)

    def test_each_command_loads_only_what_it_needs(self):
        costly = {"ssl", "sqlite3", "urllib.request", "http.client", "csv"}
        self.ok(*CREATE, "--offline", *QUEUE)
        for words, loads in ((["--help"], set()), (["--version"], {"ssl"}),
                             (["queue", "ls", *QUEUE], {"sqlite3"}),
                             (CREATE + ["--offline", *QUEUE], {"sqlite3"}),
                             (["ls"], {"ssl", "urllib.request", "http.client"})):
            code = (f"import sys; sys.path.insert(0, {HERE!r}); import tofupilot_runs as t; "
                    f"t.main({words!r}); print('LOADED', *sys.modules)")
            ran = self.ended(self.popen(sys.executable, "-I", "-S", "-B", "-c", code), 0)
            loaded = set(ran.out.rpartition("LOADED")[2].split())
            self.assertLessEqual(loaded & costly, loads, words)

    def test_a_word_too_many_is_refused_with_the_flag_that_it_lacks(self):
        """queue send FILE would send another queue."""
        self.ok(*CREATE, "--offline", *QUEUE)
        for line, meant in (("queue ls q", "--queue q"), ("queue send q", "--queue q"),
                            ("check q", "--queue q"), ("get SN-1", "--id SN-1"),
                            ("rm a", "--ids a")):
            self.assertIn(meant, self.fails(2, *line.split()).err)
        self.assertIn("--queue: is empty", self.fails(2, *CREATE, "--queue", "").err)
        self.assertIn("command is missing", self.fails(2, "queue", "--json").error["message"])
        self.assertEqual(self.stored(), [])

    def test_what_was_sent_before_is_not_told_as_new(self):
        first = self.ok(*CREATE, *QUEUE).out
        self.assertEqual(self.ok(*CREATE, *QUEUE).out, first.replace("Created", "Sent before:"))
        self.assertIn("is gone", self.fails(4, "queue", "get", "f", *QUEUE, "--json").err)
        words = create("SN-2", "--offline", *QUEUE)
        self.ok(*words)
        self.ok("queue", "move", "stick", *QUEUE)
        self.assertIn("moved to " + self.at("stick"), self.ok(*words).out)

    def test_files_that_went_up_are_linked_also_where_another_failed(self):
        """Control: without the attach of what is done, the first goes up twice."""
        words = CREATE + ["--attach", self.file("a.txt"), self.file("b.txt")]
        self.box.fault("status", "PUT .*", skip=1)
        ran = self.fails(6, *words, *ONCE)
        self.assertIn("1 of 2 attachments not: b.txt", ran.err)
        self.assertEqual(self.attached(self.stored()[0]), ["a.txt"])
        self.assertIn("Already there: a.txt", self.ok(*words).out)
        self.assertEqual(len(self.sent("PUT")), 3)

    def test_a_file_for_a_run_that_is_not_there_is_not_told_as_half_done(self):
        for more, status, said in (((), 4, "no run"), (("--url", CLOSED), 6, "cannot reach")):
            ran = self.fails(status, "create-attachment", "--id", NOBODY, "--file",
                             self.file("a.txt"), *ONCE, "--json", *more)
            self.assertNotIn("is stored", ran.err)
            self.assertIn(said, ran.error["message"])
        self.assertIn("--file", self.fails(2, "create-attachment", "--id", NOBODY).err)

    @unittest.skipUnless(POSIX, "a limit of POSIX")
    def test_a_disk_that_fills_is_no_failure_of_the_network(self):
        """Control: without the catch round the sink it is tried again and ends with 6."""
        import resource
        id = self.made()
        self.put(id, "a.txt", bytes(300000))
        ran = self.run_script("get", "--id", id, "--download", "d", status=1, preexec_fn=lambda: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))))
        self.assertIn("cannot write", ran.err)
        self.assertEqual(os.listdir("d"), [])
        self.assertEqual([path for _, path, _, _ in self.sent("GET")].count("/storage"), 1)

    @unittest.skipUnless(os.path.exists("/dev/full"), "no full disk here")
    def test_a_run_is_told_where_its_output_cannot_be_written(self):
        with open("/dev/full", "w") as full:
            ran = self.run_script(*CREATE, "--json", stdout=full, status=1)
            self.assertEqual([ran.error["id"]], self.stored())
            self.made(serial_number="SN-2")     # a note that cannot be written changes nothing
            ran = self.run_script("ls", "--limit", "1", "-q", stderr=full, status=0)
            self.assertEqual(len(ran.out.split()), 1)

    def test_too_many_values_are_told_as_such(self):
        self.says("GET /v2/runs", b"<html>", status=414, Content_Type="text/html")
        self.assertIn("fewer values", self.fails(5, "ls", "--ids", "a", "b").err)

    def test_check_fails_where_no_queue_can_be_made(self):
        self.assertIn("FAIL  queue", self.fails(6, "check", "--queue", self.at("no", "q")).out)
        self.assertIn("ok    queue", self.ok("check").out)      # the home is made when needed

    def test_text_that_utf8_cannot_write_and_years_that_utc_lacks_are_refused(self):
        for more in (("--set", "op=M\udcfcller"), ("--metadata", '{"a":"\\ud800"}'),
                     ("--docstring", "\udcfc")):
            self.assertIn("UTF-8", self.fails(2, *CREATE, *more).err)
        self.assertIn("--started-at", self.fails(
            2, *UNIT, "--started-at", "0001-01-01T00:00:00+02:00", "--ended-at", END).err)
        date = "Thu, 01 Jan 99999 00:00:00 GMT"
        self.says("GET /v2/runs", {"message": "x"}, 503, Retry_After=date)
        self.fails(6, "ls")
        self.assertEqual(self.sent("POST"), [])

    @unittest.skipUnless(POSIX, "locales of POSIX")
    def test_a_download_gets_a_name_that_the_file_system_can_write(self):
        id = self.made()
        self.put(id, WORLD + ".txt", b"x")
        env = dict(LC_ALL="C", PYTHONCOERCECLOCALE="0")
        ran = self.ended(self.popen(sys.executable, "-X", "utf8=0", SCRIPT, "get", "--id", id,
                                    "--download", "d", env=env), 0)
        self.assertEqual([name[:2] + name[-4:] for name in os.listdir("d")], ["Zo.txt"], ran)

    @unittest.skipIf(not POSIX, "no pty here")
    def test_columns_that_were_asked_for_are_all_shown(self):
        self.made()
        columns = "id,outcome,unit.serial_number,procedure.name,started_at,duration"
        text = self.terminal("ls", "--columns", columns, COLUMNS="40")[1]
        self.assertEqual([len(line.split()) for line in text.splitlines()], [6, 8])
        self.assertIn("duration", text)

    def test_a_key_that_a_server_says_back_is_not_shown_also_where_its_text_is_cut(self):
        key = self.box.user_key
        cut = {"message": "x" * (503 - len(key)) + key, "code": key}
        for body, status, kind in ((b"Authorization: Bearer " + key.encode() * 9, 200, "text/x"),
                                   (json.dumps(cut).encode(), 422, "application/json")):
            self.says("GET /v2/runs", body, status, Content_Type=kind)
            for more in (), ("--json",):
                ran = self.inside("ls", *ONCE, *more)
                self.assertNotIn(key[:20], ran.out + ran.err)

    def test_a_home_that_is_not_yet_there_is_made(self):
        for name in "new" + os.sep, os.path.join(".", "rel"):
            self.ok(*CREATE, "--offline", env={"TOFUPILOT_HOME": name})
            self.assertTrue(os.path.exists(os.path.join(name, "runs.queue")))

    def test_global_flags_stand_anywhere_and_in_any_case(self):
        self.ok(*CREATE, "--offline", *QUEUE)
        self.assertEqual(len(self.ok("queue", "--json", "ls", *QUEUE).json["data"]), 1)
        self.ok("runs", "--json", "ls")
        ran = self.fails(4, "get", "--id", NOBODY, "--format", "JSON")
        self.assertEqual(ran.error["status"], 404)
        self.assertEqual(runs.Parser("ls", prog="x", color=None).path, "ls")   # as 3.14 calls it

    def test_a_narrow_first_page_does_not_stop_the_next(self):
        """cut() never ended below 3."""
        self.assertEqual([runs.cut("abc", width) for width in range(5)],
                         ["", ".", "..", "abc", "abc "])

    def test_ctrl_c_during_an_upload_tells_the_run_that_is_stored(self):
        moment = threading.Event()
        self.box.fault("slow", "PUT .*", event=self.box.closing)
        self.box.on_request = lambda record: record.method == "PUT" and moment.set()
        process = self.start(*CREATE, "--json", "--attach", self.file("a.txt"))
        self.assertTrue(moment.wait(20))
        for _ in range(4):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
                break
        self.assertEqual([self.ended(process, 143).error["id"]], self.stored())

    def test_the_waits_of_a_command_add_up(self):
        """Control: counted for each request, the second waits too."""
        for skip in 0, 1:       # the first page's first request, and the second page's
            self.box.fault("status", ANY, status=429, skip=skip)
        self.box.store.fill(3)
        with mock.patch.object(runs, "PATIENCE", 0.0015):       # inside() waits 0.001 s each time
            self.fails(6, "ls", "--all", "--page-size", "1")
            self.box.calm()
            self.box.fault("status", ANY, status=429)
            self.ok("ls", "--all", "--page-size", "1")

    def test_a_column_of_metadata_asks_for_it(self):
        self.made(metadata={"shift": "A"})
        self.assertIn("A", self.ok("ls", "--columns", "id,metadata.shift").out.splitlines()[1])


# ---- tests: README -------------------------------------------------------------------------------

@unittest.skipUnless(shutil.which("bash"), "the recipes are for a shell: bash is missing")
class Readme(Case):
    def setUp(self):
        super().setUp()
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            self.text = file.read()

    def blocks(self, kind):
        return re.findall(rf"^```{kind}\n(.*?)^```$", self.text, re.M | re.S)

    def test_every_recipe_that_can_run_runs_in_its_order(self):
        shutil.copy(SCRIPT, self.folder)
        os.symlink(sys.executable, self.at("python3"))
        blocks = self.blocks("sh") + [
            f"cat > report.py <<'END'\n{code}END\npython3 -B report.py\n"
            for code in self.blocks("python")]
        self.assertGreater(len(blocks), 8)
        told = self.ended(self.popen("bash", "-e", "-u", env={
            "PATH": f"{self.folder}:{os.environ['PATH']}"}), 0, "\n".join(blocks).encode())
        self.assertIn("Created run", told.out)
        serials = [row["unit"]["serial_number"] for row in self.ok("ls", "--json").json["data"]]
        self.assertEqual(sorted(set(serials)), [f"SN-000{number}" for number in range(1, 6)])
        self.assertEqual(content("evidence/log.txt"), b"tx_power 17.1 dBm\n")

    def test_the_reference_names_every_flag_and_the_page_stays_short(self):
        for name, command in runs.COMMANDS.items():
            row = re.search(rf"^\| `{name}` \|.*$", self.text, re.M)
            self.assertIsNotNone(row, name)
            for field in command.fields:
                self.assertIn(f"`{runs.flag(field.name)}`", row.group(), name)
        for field in runs.GLOBAL:
            self.assertIn(f"| `{runs.flag(field.name)}", self.text)
        self.assertLess(len(self.text.splitlines()), 400)


# ---- demo and bench ------------------------------------------------------------------------------

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
    """The subcommands, each as a user types it, against a sandbox on a free port -> exit status."""
    environment = {key: value for key, value in os.environ.items() if key not in (
        "TOFUPILOT_QUEUE", "TOFUPILOT_CA_CERT")}
    with tempfile.TemporaryDirectory() as folder, Sandbox(examples=True) as box:
        environment.update(TOFUPILOT_URL=box.url, TOFUPILOT_API_KEY=box.user_key,
                           TOFUPILOT_HOME=folder, NO_PROXY="127.0.0.1")
        for line in DEMO.strip().splitlines():
            print(f"\n$ python3 tofupilot_runs.py {line}", flush=True)
            status = subprocess.call([sys.executable, SCRIPT] + shlex.split(line),
                                     env=environment, stdin=subprocess.DEVNULL)
            if status:
                print(f"exit status {status}")
                return 1
    return 0


# a small process that starts the one to be measured: a child begins with its parent's peak
LAUNCH = """import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print("peak", usage.ru_maxrss, file=sys.stderr)
sys.exit(1 if status else 0)"""


PEER = ("import os; from tofupilot.v2 import TofuPilot\n"        # the official SDK
        "peer = TofuPilot(api_key=os.environ['KEY'], server_url=os.environ['API'])\n")


class Bench:
    """Measures in turns and prints a row for each ratio, beside its bound."""

    def __init__(self, box, folder, peer):
        self.box, self.folder, self.peer, self.missed = box, folder, peer, 0
        self.queue = os.path.join(folder, "many.queue")
        self.env = dict(os.environ, TOFUPILOT_URL=box.url, TOFUPILOT_API_KEY=box.user_key,
                        TOFUPILOT_HOME=folder, NO_PROXY="127.0.0.1", DISABLE_TELEMETRY="true",
                        KEY=box.user_key, API=box.url + "/api")

    def row(self, what, value, bound, text):
        within = value >= bound if bound < 1 and "send" in what else value <= bound
        self.missed += not within
        print(f"{what:<50} {value:7.2f}  {bound:5.2f}  {'ok  ' if within else 'MISS'}  {text}",
              flush=True)

    def timed(self, *command):
        """(seconds, text of stderr) of one process, which must succeed."""
        started = time.perf_counter()
        ran = subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seconds, told = time.perf_counter() - started, ran.stderr.decode("utf-8", "replace")
        if ran.returncode:
            raise SystemExit(f"{command} ended with {ran.returncode}: {told}")
        return seconds, told

    def pair(self, what, bound, ours, code, rounds=11, python=sys.executable):
        """The median of a Python with our words against that of `python -c code`, in turns."""
        times = [(self.timed(sys.executable, *ours)[0], self.timed(python, "-c", code)[0])
                 for _ in range(rounds)]
        a, b = (sorted(column)[rounds // 2] for column in zip(*times))
        self.row(what, a / b, bound, f"{1000 * a:.0f} ms against {1000 * b:.0f} ms")

    def memory(self, what, *words):
        """The peak of a command of the script, in MB."""
        if not hasattr(os, "wait4"):
            return print(f"{what + ': memory':<50} not measured on this system")
        seconds, told = self.timed(sys.executable, "-S", "-c", LAUNCH, sys.executable, SCRIPT,
                                   *words)
        peak = int(re.search(r"^peak (\d+)$", told, re.M).group(1))
        self.row(what + ": memory", peak / (1 << (20 if sys.platform == "darwin" else 10)), 40,
                 f"MB, in {seconds:.1f} s")

    def starts(self):
        shutil.copy(SCRIPT, self.folder)
        self.env.update(PYTHONPATH=self.folder)
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        floor, offline = "import argparse, json", [*CREATE, "--offline"]
        bare = (floor + ", os, urllib.request as u; json.load(u.urlopen(u.Request(os.environ['API']"
                " + '/v2/runs?limit=50', headers={'Authorization': 'Bearer ' + "
                "os.environ['KEY']})))")
        for what, bound, words, code in (
                ("--help / argparse, json", 1.6, [SCRIPT, "--help"], floor),
                ("ls --help / the same", 2.0, [SCRIPT, "ls", "--help"], floor),
                ("create --offline / with sqlite3", 1.8, [SCRIPT] + offline, floor + ", sqlite3"),
                ("python3 -m, --help / argparse, json", 1.6, ["-m", "tofupilot_runs", "--help"],
                 floor),
                ("python3 -m, create --offline / with sqlite3", 1.8,
                 ["-m", "tofupilot_runs"] + offline, floor + ", sqlite3"),
                ("ls / one bare request", 1.4, [SCRIPT, "ls", "--json"], bare),
                ("create / one bare request", 1.4, [SCRIPT] + CREATE, bare)):
            self.pair(what, bound, words, code)
        if self.peer:
            self.pair("one ls / the official SDK", 0.15, [SCRIPT, "ls", "--json"],
                      PEER + "peer.runs.list(limit=50)", 5, self.peer)

    def pages(self):
        self.box.store.fill(100000)
        for form in ("json", "jsonl", "csv", "table"):
            self.memory(f"ls --all, 100,000 runs, {form}", "ls", "--all", "--format", form)
        if self.peer:
            self.pair("ls of 20,000 runs / the official SDK's loop", 0.25,
                      [SCRIPT, "ls", "--limit", "20000", "--json"], PEER + "cursor = 0\n"
                      "while cursor is not None and cursor < 20000:\n"
                      "    cursor = peer.runs.list(limit=100, cursor=cursor).meta.next_cursor\n",
                      1, self.peer)

    def files(self):
        big, queue, down = (os.path.join(self.folder, name) for name in (
            "big.bin", "big.queue", "down"))
        with open(big, "wb") as file:
            for _ in range(1024):
                file.write(os.urandom(1 << 20))
        run = subprocess.check_output([sys.executable, SCRIPT, *CREATE, "-q"], env=self.env)
        run = run.decode().strip()
        self.memory("1 GB up, direct", "create-attachment", "--id", run, "--file", big)
        self.memory("1 GB into the queue", *CREATE, "--offline", "--queue", queue,
                    "--docstring", "big", "--attach", big)
        self.memory("1 GB from the queue", "queue", "send", "--queue", queue)
        print(f"{'':50} the queue file has {os.path.getsize(queue) >> 10} KB afterwards")
        self.memory("1 GB down", "get", "--id", run, "--download", down)

    def queued(self, count=10000):
        """queue send against a bare keep-alive loop of the same POSTs, in runs a second."""
        bodies = [runs.with_ref(dict(BODY, serial_number=f"Q-{number}")) for number in range(count)]
        costs = []
        with runs.Queue(self.queue) as store:
            for body in bodies:
                started = time.perf_counter()
                store.store(body, [])
                costs.append(time.perf_counter() - started)
        first, last = (sorted(part)[50] for part in (costs[:100], costs[-100:]))
        self.row("enqueueing the last of 10,000 / the first", last / first, 1.5,
                 f"{1000 * last:.1f} ms against {1000 * first:.1f} ms")
        words = ["--queue", self.queue]
        self.pair("queue ls of 10,000 / 1 s", 1.0, [SCRIPT, "queue", "ls"] + words,
                  "import time; time.sleep(1)", 3)
        started = time.perf_counter()
        connection = http.client.HTTPConnection(self.box.url.split("//")[1])
        for body in bodies:
            body = dict(body, serial_number="L" + body["serial_number"],
                        client_run_ref="L" + body["client_run_ref"])
            connection.request("POST", "/api/v2/runs", json.dumps(body).encode(), {
                "Authorization": "Bearer " + self.box.user_key, "Content-Type": "application/json"})
            connection.getresponse().read()
        connection.close()
        bare = count / (time.perf_counter() - started)
        ours = count / self.timed(sys.executable, SCRIPT, "queue", "send", *words)[0]
        self.row("queue send / bare loop of the same POSTs", ours / bare, 0.7,
                 f"{ours:.0f} against {bare:.0f} runs a second")


def bench(argv):
    """Prints the table of ratios, each taken in this one run -> 0, also where a bound is missed."""
    peer = os.environ.get("PEER_PYTHON")
    print(f"{platform.platform()}, {os.cpu_count()} processors, Python "
          f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}")
    version = peer and subprocess.check_output([peer, "-m", "pip", "show", "tofupilot"]).decode()
    print("the official SDK: " + (version.split()[3] if peer
                                  else "missing, name it with PEER_PYTHON="))
    print(f"{'':50}   ratio  bound")
    with tempfile.TemporaryDirectory() as folder, Sandbox() as box:
        box.keep = False
        table = Bench(box, folder, peer)
        for measure in (table.starts, table.queued, table.pages, table.files):
            measure()
        seconds, ideal, refused, peak = fleet()
        table.row("fleet of 200 stations: time to drain / ideal", seconds / ideal, 1.5,
                  f"{refused:.0%} of requests refused, peak {peak:.0f}/s (simulated clock)")
    print(f"{table.missed} rows are outside their bound")
    return 0


# ---- main ----------------------------------------------------------------------------------------

def test_classes():
    return sorted(name for name, item in globals().items() if isinstance(item, type)
                  and issubclass(item, unittest.TestCase) and name[-4:] != "Case")


def run_class(name, python):
    """(output, passed, failed, skipped) of one class of tests, in a process of its own."""
    output = subprocess.run([python, "-B", "-X", "dev", "-W", "error", os.path.abspath(__file__),
                             "test", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = output.stdout.decode("utf-8", "replace")
    counts = re.search(r"^(\d+) passed, (\d+) failed, (\d+) skipped$", output, re.M)
    return (output,) + (tuple(map(int, counts.groups())) if counts else (0, 1, 0))


def test(argv):
    """Runs the tests (the classes named, or all, a process each) -> 1 if one failed.

    --all runs them with every Python from 3.6 to 3.13 that is on the PATH or in pyenv's folder.
    """
    if argv == ["--all"]:
        return max([test_with(python) for python in find_pythons()] or [1])
    if not argv:
        return test_with(sys.executable)
    suite = unittest.defaultTestLoader.loadTestsFromNames(argv, sys.modules[__name__])
    result = unittest.TextTestRunner(sys.stdout).run(suite)
    failed = len({getattr(test, "test_case", test) for test, _ in result.failures + result.errors})
    for skipped, why in result.skipped:
        print(f"skipped: {skipped.id().rpartition('.')[2]}: {why}")
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed, "
          f"{len(result.skipped)} skipped")
    return 1 if failed else 0


def test_with(python):
    """All classes with one Python, as many at a time as there are processors."""
    started, totals = time.time(), [0, 0, 0]
    pool = multiprocessing.pool.ThreadPool(os.cpu_count() or 1)
    for output, *counts in pool.imap(functools.partial(run_class, python=python), test_classes()):
        totals = [sum(pair) for pair in zip(totals, counts)]
        if counts[1]:
            print(output)
        print("".join(line + "\n" for line in output.splitlines()
                      if line.startswith("skipped: ")), end="", flush=True)
    pool.close()
    pool.join()
    version = subprocess.check_output([python, "-V"], stderr=subprocess.STDOUT).decode().split()[1]
    print(f"Python {version}, {time.time() - started:.0f} s")
    print(f"{totals[0]} passed, {totals[1]} failed, {totals[2]} skipped", flush=True)
    return 1 if totals[1] else 0


def find_pythons():
    """An interpreter for each version from 3.6 to 3.13 that is there."""
    found, path = [], os.pathsep.join(folder for folder in os.environ.get("PATH", "").split(
        os.pathsep) if "shims" not in folder)
    for name in [f"3.{minor}" for minor in range(6, 14)]:
        places = [shutil.which("python" + name, path=path) or ""] + sorted(glob.glob(
            os.path.join(PYENV, "versions", name + ".*", "bin", "python")))
        found += [place for place in places if os.access(place, os.X_OK)][:1]
    return found


COMMANDS = {"serve": serve, "sandbox": lambda argv: serve(argv + ["--examples"]), "demo": demo,
            "bench": bench, "test": test, "trials": trials}


def main():
    name, *argv = sys.argv[1:] or ["test"]
    if name not in COMMANDS:
        print("usage: test_tofupilot_runs.py [test | demo | serve | sandbox | bench | trials]")
        return 2
    # a shell that starts this with & has it ignored, and the script would heed that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return COMMANDS[name](argv)


if __name__ == "__main__":
    sys.exit(main())
