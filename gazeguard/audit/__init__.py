"""Audit of a model: does it use the image at all, and does its guard notice when words and image do not belong together?

audit = audit_model(guard)            # drawn scenes; the lab's world by default
Path("audit.html").write_text(page(audit))
"""

from gazeguard.audit.page import page
from gazeguard.audit.probes import Audit, Probe, Share, Unguarded, audit_model

__all__ = ["Audit", "Probe", "Share", "Unguarded", "audit_model", "page"]
