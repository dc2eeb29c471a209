# SPDX-License-Identifier: Apache-2.0
"""anabranch: safe, scalable transfer with dynamic experts."""

__version__ = "0.1.0"
