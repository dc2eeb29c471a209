# SPDX-License-Identifier: Apache-2.0
"""Erasers that others are compared with, one file each.

Those that are trained have a function `training`: the objective and the stream for `anabranch.train.loop.train`.
"""
