# SPDX-License-Identifier: Apache-2.0
"""What must not transfer: find it, take it out, and check that it is gone."""
