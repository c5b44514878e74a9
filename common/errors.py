"""Every error a caller may catch.

ProxyMoEError
├── ConfigError          an experiment or policy file says something impossible
├── DataError            a row, file or data set cannot be used
├── CheckpointError      a checkpoint is missing, truncated, corrupted or not finite
├── UnsupportedModel     a model family or layout that ProxyMoE does not handle
├── PlanError            a plan does not fit its base model
│   └── BudgetError      a byte budget below what any proxy submodel needs
├── LayoutMismatch       an adapter or update does not fit the layout it is used with
├── IntegrityError       bytes do not match the digest they were promised under
├── ProtocolError        a message is malformed, oversized or belongs to another round
│   └── Equivocation     a device signed two different messages for one place
├── Unsummed             too few devices were left for a masked sum; no update was seen
├── PrivacySpent         another release would cost a device more epsilon than was promised
└── Diverged             local training stopped; nothing was sent

Each message gives the value, the limit and the remedy, and never private data.
"""


class ProxyMoEError(Exception):
    """Base of every error that a user can cause or cure."""


class ConfigError(ProxyMoEError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(ProxyMoEError):
    """A data file or row cannot be used; the message names file and line."""


class CheckpointError(ProxyMoEError):
    """A checkpoint cannot be read as promised by its headers."""


class UnsupportedModel(ProxyMoEError):
    """The model is not a mixture of experts that ProxyMoE understands."""


class PlanError(ProxyMoEError):
    """A plan names experts, layers or a base model that do not match."""


class BudgetError(PlanError):
    """The byte budget cannot hold the trunk and one expert per layer."""


class LayoutMismatch(ProxyMoEError):
    """An adapter vector and an adapter layout do not belong together."""


class IntegrityError(ProxyMoEError):
    """Content differs from its digest."""


class ProtocolError(ProxyMoEError):
    """A message that must be refused."""


class Equivocation(ProtocolError):
    """Two different messages for one place, both signed by the same device."""


class Unsummed(ProxyMoEError):
    """Too few devices answered for what they masked to be summed."""


class PrivacySpent(ProxyMoEError):
    """The epsilon that was promised to a device is used up; nothing more may be released."""


class Diverged(ProxyMoEError):
    """The local loss became non-finite or exploded; no update exists."""
