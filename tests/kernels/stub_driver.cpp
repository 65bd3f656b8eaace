// A libcuda.so.1 for tests without a GPU: hands out made-up handles, prints the calls that a launch makes and, at a launch,
// the arguments that it finds behind the pointers ("P" 8 bytes, "i" and "f" 4; STUB_PARAMETERS names them).
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef unsigned int u32;

extern "C" {
static int ignore() { return 0; }

int cuInit(u32) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(intptr_t)(100 + device), 0; }
int cuCtxSetCurrent(void* context) { return printf("context %d\n", (int)(intptr_t)context), 0; }

int cuThreadExchangeStreamCaptureMode(int* mode) {
    static int current = 0;
    const int previous = current;
    printf("capture mode %d\n", *mode);
    current = *mode, *mode = previous;
    return 0;
}

int cuModuleLoadData(void** module, const void* image) {
    *module = (void*)7;
    return memcmp(image, "\x7f" "ELF", 4) ? 200 : 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = (void*)(intptr_t)(8 + (intptr_t)module);
    return printf("function %s\n", name), 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    printf("attribute %d of %d: %d\n", attribute, (int)(intptr_t)function, value);
    return value > 232448 ? 1 : 0;
}

int cuGetErrorString(int, const char** text) { return *text = "made up", 0; }

int cuLaunchKernel(void* function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared, void* stream, void** params,
                   void**) {
    const char* letters = getenv("STUB_PARAMETERS");
    if (!letters) return 0;
    printf("launch %d: %u %u %u, %u %u %u, %u, stream %d:", (int)(intptr_t)function, gx, gy, gz, bx, by, bz, shared,
           (int)(intptr_t)stream);
    for (int i = 0; letters[i]; ++i) {
        if (letters[i] == 'P') printf(" %lld", (long long)*(int64_t*)params[i]);
        if (letters[i] == 'i') printf(" %d", *(int*)params[i]);
        if (letters[i] == 'f') printf(" %g", *(float*)params[i]);
    }
    return printf("\n"), 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    Dl_info self;
    dladdr((void*)&cuInit, &self);
    void* found = dlsym(dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD), name);
    *function = found ? found : (void*)&ignore;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
