"""`make attack`: whatever a caller, a picture server or the platform may send, sent on purpose."""
