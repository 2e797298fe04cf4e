"""The paper's Table 3 and Figure 2 with this engine: both methods on the same photographs for the same time.

``comparison.compare`` is the whole job (what ``retinar bench table3`` runs).
"""
