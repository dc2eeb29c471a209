# SPDX-License-Identifier: Apache-2.0
"""The commands' work: verbs put together into a run with a folder and a page.

transfer    measure, pretrain, customize: does sharing hurt, and experts against it
erase       scan, train, sample, eval, bake, and the data of implicit concepts
align       chain, train, chat, generate, eval, export
experts     profile, rank, steer, generate, tune, prune, merge, families

Beside the rooms stands what several of them use.
"""
