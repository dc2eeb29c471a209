# SPDX-License-Identifier: Apache-2.0
"""What model hubs expect of a folder: a way in, a way out, a card."""
