/* The same loops for processors that have AVX2, chosen when the library is loaded: copies with digests take a seventh
 * less. Other x86-64 processors have to start, so one build cannot be for both. */

#include "kernels.c"
