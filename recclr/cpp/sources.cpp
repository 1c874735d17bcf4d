// What the library was compiled from, for hatch_build.fingerprint.

extern "C" const char *recclr_sources() { return RECCLR_SOURCES; }
