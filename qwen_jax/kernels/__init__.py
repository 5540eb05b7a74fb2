"""Operations that have more than one implementation.

Each file has one public function, its XLA reference and the rule that chooses between them; Pallas
bodies stand in _pallas_*.py files, imported by nobody else. Kernels know no model.
"""
