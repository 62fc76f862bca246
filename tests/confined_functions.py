"""What tests/unit/test_untrusted.py runs in a process of its own, which imports this file and so nothing slow."""

import ctypes
import os

from pipelines.errors import UserError


def value_and_process(value):
    return [value, os.getpid()]


def takes_memory():
    return len(bytearray(1 << 40))


def never_ends():
    while True:
        pass


def crashes():
    ctypes.string_at(8)


def prints():
    os.write(1, b"noise")
    print("more noise")
    return 1


def complains():
    raise UserError("x: fix it")


def disk_full():
    raise OSError(28, "whatever")
