"""Core ML: anchor and retriever as .mlpackage, checked without a Mac."""

import logging

# On import it warns of every torch and scikit-learn it was not tried with, and on Linux of each part of Core ML.
logging.getLogger("coremltools").setLevel(logging.ERROR)
