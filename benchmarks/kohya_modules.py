"""The modules that kohya's trainer changes."""

KOHYA_DEFAULT = r"(\.attn\d\.to_(q|k|v|out\.0)|\.ff\.net\.(0\.proj|2)|\.proj_(in|out)|self_attn\.\w+_proj|mlp\.fc\d)$"
"""Found in their canonical names, with its own defaults."""
