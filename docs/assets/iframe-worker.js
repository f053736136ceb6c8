// Browsers start no worker for a page that was opened from disk, and the theme's search is one. There it runs in a hidden
// frame that takes and sends messages as a worker does. Its script looks for `IFrameWorker` to know that it is in a frame.
class IFrameWorker extends EventTarget {
  constructor(address) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    frame.setAttribute("aria-hidden", "true");
    frame.title = "search";
    this.ready = new Promise((resolve) => {
      const start = () => {
        document.body.append(frame);
        frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = frame.contentDocument.createElement("script");
        script.src = new URL(address, document.baseURI).href;
        script.onload = () => resolve(frame.contentWindow);
        frame.contentDocument.body.append(script);
      };
      if (document.body) { start(); } else { document.addEventListener("DOMContentLoaded", start); }
    });
  }

  postMessage(data) {
    this.ready.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
  }
}
if (location.protocol === "file:") {
  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
}
