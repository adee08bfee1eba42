"""Selective attention search, SAS: which layers, or heads, deserve self-attention."""
