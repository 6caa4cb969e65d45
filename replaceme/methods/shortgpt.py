"""ShortGPT (arXiv 2403.03853): drop the layers that change their input least, adjacent or not."""

from replaceme.methods.method import Method, leave_empty
from replaceme.selection.criteria import CRITERIA

METHOD = Method(solve=leave_empty("ShortGPT"), criterion=CRITERIA["influence"])
