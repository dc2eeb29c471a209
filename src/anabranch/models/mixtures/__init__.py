# SPDX-License-Identifier: Apache-2.0
"""The bridge to mixture-of-experts language models of transformers: found by structure, checked by numbers.

    layers    where router, experts and shared experts are, and a refusal where they are not what they seem
    bank      one expert's matrices as views of the fused storage, and what an expert makes of a token
    routing   read the routing of a forward pass; change it; read what the experts put out
    adapter   chosen experts as a folder of their own, put in and taken out
    fused     the experts of a forward pass, faster on processors; picker chooses when
    fingerprint   whether a file was made on this very model
    surgery   fewer experts, more experts, another order; the configuration follows
    families  a tiny model of every family that the bridge is tested on

The contract: router(h) -> (router_logits (T, N), routing_weights (T, K), selected_experts (T, K)), then
experts(h (T, D), selected_experts, routing_weights) -> (T, D).
"""
