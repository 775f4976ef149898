"""AOTInductor packages, which run without lopro_fx."""
