"""Search for the best assignments of clips with a block-causal proxy (design.md section 9)."""

from evatok.assignment.search.beam import BeamResult, beam
from evatok.assignment.search.bounded import BestResult, Calibration, best
from evatok.assignment.search.exhaustive import brute_force, full
from evatok.assignment.search.tree import PrefixTree

__all__ = ["BeamResult", "BestResult", "Calibration", "PrefixTree", "beam", "best", "brute_force", "full"]
