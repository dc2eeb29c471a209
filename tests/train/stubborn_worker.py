# SPDX-License-Identifier: Apache-2.0
"""A loop that sees the flag but does not end."""

from anabranch.train.signals import StopFlag

with StopFlag() as stop:
    print("ready", flush=True)
    while not stop.is_set:
        pass
    print("first signal", flush=True)
    while True:
        pass
