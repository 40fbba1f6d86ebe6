"""Networks by name, by "module:function" or by object, and views of their state and their parts."""

from prunelab.networks.blocks import GRANULARITIES as GRANULARITIES
from prunelab.networks.blocks import parameter_blocks as parameter_blocks
from prunelab.networks.build import Network as Network
from prunelab.networks.build import build_model as build_model
from prunelab.networks.build import check_model as check_model
from prunelab.networks.build import fitted as fitted
from prunelab.networks.builtin import ADJUSTABLE_WIDTH as ADJUSTABLE_WIDTH
from prunelab.networks.builtin import MODELS as MODELS
from prunelab.networks.builtin import InputShape as InputShape
from prunelab.networks.state import float_state as float_state
from prunelab.networks.state import is_wholly_exchanged as is_wholly_exchanged
from prunelab.networks.state import uninitialised as uninitialised
from prunelab.networks.width import narrow_width as narrow_width
