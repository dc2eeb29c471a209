# SPDX-License-Identifier: Apache-2.0
"""Text-to-image pipelines of diffusers: what is asked of all of them, a file a family, and what they share."""
