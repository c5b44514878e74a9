"""ProxyMoE: devices improve a Mixture-of-Experts language model that they are too small to hold.

A coordinator cuts a proxy submodel per device: the whole trunk and the whole router, but only the
experts that matter to that device. The device tunes LoRA adapters on private data, and only a
clipped adapter update leaves it. Updates are averaged per expert over the devices that hold that
expert, and return to the full model by identity, because every kept expert is bit-identical to
the full model's.

    proxymoe.common        what both sides must agree on
    proxymoe.server        profile, extract, aggregate, merge
    proxymoe.client        personalize on the device
    proxymoe.simulations   many devices on one machine, experiments and benchmarks

Dependencies point one way: simulations -> (server | client) -> common.
"""

__version__ = "0.1.0"
