// What the shared library shows. Everything is hidden unless it says REFIT_API;
// client/refit.symbols lists what does.
#pragma once

/// On a public class (all of its members) or a public function that is not inline.
#define REFIT_API __attribute__((visibility("default")))
/// On what lies inside a REFIT_API class and is nobody else's business.
#define REFIT_LOCAL __attribute__((visibility("hidden")))
