# SPDX-License-Identifier: Apache-2.0
"""All experts stay; a token passes over those that it would give little weight to."""
