// What the toolkit's libcuda.so answers: that it only links.

extern "C" __attribute__((visibility("default"))) int cuInit(unsigned int) { return 34; }
extern "C" __attribute__((visibility("default"))) int cuDriverGetVersion(int*) { return 34; }
